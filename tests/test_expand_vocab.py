"""Expanded vocabularies against SentencePiece, and grown models against the old ones and transformers."""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bpe import encoded, model_of

import expand_vocab
from chatglm_tokenizer.batch_encoder import BatchEncoder
from chatglm_tokenizer.expansion import CJK, cuts, expand
from chatglm_tokenizer.model_file import CONTROL, NORMAL, USER_DEFINED, append_pieces, read_model
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange.hf_tokenizer_file import fast_tokenizer
from model import ModelArgs, Transformer
from stage import UserError, parse
from training import checkpoint
from training.plain import write_plain
from training.state import weights_of
from training.vocabulary_rows import add_rows

DOMAIN = (
    "糖尿病患者应当监测血糖。糖尿病人的血糖控制很重要。高血压患者需要服用降压药。the patient has diabetes mellitus。"
    "患者出现咳嗽、发热、乏力等症状，建议到呼吸内科就诊。皇上下诏说：任命他为中书侍郎。insulin 12 units daily"
)
TEXT = (
    st.text(max_size=40)
    | st.text("糖尿病患者血压高，。：the ins", max_size=40)
    | st.lists(st.sampled_from(re.split("[ 。，]", DOMAIN) + [" ", "，", "\n", "z"]), max_size=8).map("".join)
)


def file_of(content: bytes, folder, name: str) -> ChatGLMTokenizer:
    (folder / name).write_bytes(content)
    return ChatGLMTokenizer(folder / name)


@pytest.fixture(scope="module")
def extra(tmp_path_factory) -> bytes:
    """A domain vocabulary with Chinese and English pieces."""
    path = tmp_path_factory.mktemp("extra") / "domain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([DOMAIN, DOMAIN[7:], DOMAIN[30:]] * 20), model_prefix=str(path), vocab_size=460,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return path.with_suffix(".model").read_bytes()


@pytest.fixture(scope="module", params=["own", "chatglm2"])
def base(request) -> ChatGLMTokenizer:
    if request.param == "own":
        return ChatGLMTokenizer(request.getfixturevalue("vocabulary"))
    return request.getfixturevalue("chatglm2")


@pytest.fixture(scope="module")
def grown(base, extra, tmp_path_factory) -> dict[str, ChatGLMTokenizer]:
    folder = tmp_path_factory.mktemp("grown")
    return {
        mode: file_of(expand(base, extra, mode).content, folder, f"{mode}.model") for mode in ("cjk", "all")
    }


@settings(max_examples=60, deadline=None)
@given(
    line=st.text(st.characters(max_codepoint=127), max_size=80) | st.sampled_from(["the patient has insulin"])
)
def test_cjk_mode_leaves_every_line_without_cjk_alone(base, grown, line) -> None:
    assert grown["cjk"].encode(line) == base.encode(line)


def test_mode_all_changes_english(base, grown) -> None:
    line = "the patient has diabetes mellitus"
    assert grown["all"].encode(line) != base.encode(line)
    assert len(grown["all"].encode(line)) < len(base.encode(line))


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_new_tokens_are_rows_of_old_ones_and_text_comes_back(base, grown, text) -> None:
    """Tokens of the base are joined, never cut; what has no new piece in it keeps its ids."""
    for new in grown.values():
        ids, old = new.encode(text), base.encode(text)
        assert new.decode(ids) == base.decode(old)
        assert all(i < base.pieces or i >= base.vocab_size for i in ids)
        pieces = [new.sp.id_to_piece(i) for i in ids]
        ends, old_ends = (set(np.cumsum([size(t, i) for i in row])) for t, row in ((new, ids), (base, old)))
        assert ends <= old_ends, pieces
        if max(ids, default=0) < base.vocab_size:
            assert ids == old


def size(tokenizer: ChatGLMTokenizer, i: int) -> int:
    return int(tokenizer.bytes_per_token_cached[i])


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
def test_compiled_encoder_agrees(encoders, texts) -> None:
    for encoder in encoders.values():
        assert encoded(encoder, texts) == [encoder.tokenizer.sp.encode(text) for text in texts]


@pytest.fixture(scope="module")
def encoders(grown) -> dict[str, BatchEncoder]:
    made = {mode: BatchEncoder(tokenizer) for mode, tokenizer in grown.items()}
    assert all(encoder.vocabulary is not None for encoder in made.values())
    return made


@pytest.fixture(autouse=True, scope="module")
def byte_sizes() -> None:
    """The sizes of a vocabulary's tokens, made once."""
    sizes: dict[str, np.ndarray] = {}

    def cached(tokenizer: ChatGLMTokenizer) -> np.ndarray:
        if tokenizer.sha256 not in sizes:
            sizes[tokenizer.sha256] = tokenizer.bytes_per_token()
        return sizes[tokenizer.sha256]

    ChatGLMTokenizer.bytes_per_token_cached = property(cached)
    yield
    del ChatGLMTokenizer.bytes_per_token_cached


def test_base_ids_and_specials_keep_their_places(base, extra) -> None:
    for mode in ("cjk", "all"):
        expansion = expand(base, extra, mode)
        old, new = read_model(base.content), read_model(expansion.content)
        count = len(old.pieces)
        assert new.pieces[:count] == old.pieces and new.scores[:count] == old.scores
        assert new.kinds[:count] == old.kinds
        assert new.kinds[count : expansion.first] == [CONTROL] * (base.vocab_size - count)
        assert new.pieces[expansion.first :] == expansion.appended
        sp = sentencepiece.SentencePieceProcessor(model_proto=expansion.content)
        assert sp.vocab_size() == len(new.pieces) == expansion.first + len(expansion.appended)
        assert not cuts(expansion.content, expansion.appended, expansion.first)
        source = read_model(extra)
        counted = expansion.present + expansion.reserved + expansion.not_cjk + len(expansion.unreachable)
        assert counted + len(expansion.appended) - expansion.bridges == len(source.pieces)
        assert mode == "all" or all(CJK.fullmatch(piece) for piece in expansion.appended)
        assert mode == "cjk" or any(piece.isascii() or "▁" in piece for piece in expansion.appended)


def test_chatglm2_specials_are_control_symbols(chatglm2, extra, tmp_path) -> None:
    new = file_of(expand(chatglm2, extra, "cjk").content, tmp_path, "new.model")
    assert [new.sp.id_to_piece(i) for i in range(64_789, 64_793)] == ["[MASK]", "[gMASK]", "[sMASK]", "<sop>"]
    assert new.encode("[gMASK] Philosophy <sop>") == chatglm2.encode("[gMASK] Philosophy <sop>")
    assert new.decode([64_790, *new.encode("你好")]) == "你好"


def test_a_piece_that_the_base_cuts_is_bridged(tmp_path) -> None:
    """The base joins bc first, so abcd is cut into a, bc, d: only a bridge, abc, leads to it."""
    letters = {c: -50.0 - i for i, c in enumerate("▁abcd")}
    base = file_of(model_of({"bc": -1.0, **letters}), tmp_path, "base.model")
    expansion = expand(base, model_of({"ab": -1.0, "cd": -2.0, "abcd": -3.0, **letters}), "all")
    assert set(expansion.appended) == {"ab", "cd", "abcd", "abc"} and expansion.bridges == 1
    assert not expansion.unreachable and expansion.present == 5
    new = file_of(expansion.content, tmp_path, "new.model")
    assert new.sp.encode("abcd", out_type=str)[-1] == "abcd"


def test_unigram_vocabularies_can_be_added_but_not_be_the_base(tmp_path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([DOMAIN] * 20), model_prefix=str(tmp_path / "unigram"), vocab_size=400,
        model_type="unigram", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    unigram = tmp_path / "unigram.model"
    base = file_of(model_of({"▁": -9.0, "糖": -10.0}), tmp_path, "base.model")
    expansion = expand(base, unigram.read_bytes(), "all")
    assert not cuts(expansion.content, expansion.appended, expansion.first)
    out = tmp_path / "out.model"
    with pytest.raises(UserError, match="unigram"):
        run("--base", unigram, "--add", base.vocab_file, "--out", out)
    assert not out.exists()


def test_words_that_were_defined_by_hand_are_added_too(base) -> None:
    """`user_defined_symbols`, the usual way to get a domain's terms into a vocabulary for sure."""
    extra = model_of({"降糖药": 0.0, "糖尿病": -1.0}, kinds={"降糖药": USER_DEFINED})
    grown = expand(base, extra, "cjk")
    assert "降糖药" in grown.appended and "降糖药" not in grown.unreachable


def test_an_export_warns_of_pieces_that_tie(base, extra, capsys) -> None:
    """Chinese-LLaMA's script gives all new pieces the score 0, which no list of merges can follow; ours does not."""
    fast_tokenizer(base, base.vocab_size)
    assert not capsys.readouterr().out
    pieces = [(piece, 0.0, NORMAL) for piece in ("糖尿病人", "尿病人的", "人的血糖")]
    with tempfile.TemporaryDirectory() as folder:
        tied = file_of(append_pieces(base.content, pieces), Path(folder), "tied.model")
    fast_tokenizer(tied, tied.vocab_size)
    assert "分数相同" in capsys.readouterr().out


def test_only_new_pieces_and_their_count_change_in_the_file(base) -> None:
    grown = append_pieces(base.content, [("新条目甲", -1e6, NORMAL)])
    old, new = read_model(base.content), read_model(grown)
    assert new.pieces == [*old.pieces, "新条目甲"] and len(append_pieces(base.content, [])) == len(
        base.content
    )
    assert {**vars(new), "pieces": 0, "scores": 0, "kinds": 0} == {
        **vars(old),
        "pieces": 0,
        "scores": 0,
        "kinds": 0,
    }
    assert sentencepiece.SentencePieceProcessor(model_proto=grown).id_to_piece(base.pieces) == "新条目甲"


def test_files_with_a_self_test_still_load(tmp_path, extra) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([DOMAIN] * 30), model_prefix=str(tmp_path / "tested"), vocab_size=345,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        self_test_sample_size=5, unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False,
    )  # fmt: skip
    base = ChatGLMTokenizer(tmp_path / "tested.model")
    assert file_of(expand(base, extra, "all").content, tmp_path, "new.model").encode(DOMAIN)


# --- checkpoints ---


def small_model(vocab_size: int, tied: bool) -> Transformer:
    torch.manual_seed(0)
    args = ModelArgs(32, 2, 4, 2, vocab_size, max_seq_len=64, tie_embeddings=tied)
    return Transformer(args).eval()


def run(*arguments: object) -> None:
    """The stage as its command line runs it, without a process of its own."""
    expand_vocab.main(parse(expand_vocab.Config, list(map(str, arguments))))


def save_model(folder, model: Transformer, tokenizer: ChatGLMTokenizer) -> None:
    write_plain(folder, model.args, weights_of(model), tokenizer.files, {"made": "by a test"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["subtokens", "mean", "random"])
def test_grown_model_gives_the_old_logits(tmp_path, vocabulary, extra, tied, how) -> None:
    base = ChatGLMTokenizer(vocabulary)
    model = small_model(base.vocab_size, tied)
    save_model(tmp_path / "start", model, base)
    (tmp_path / "add.model").write_bytes(extra)
    out = tmp_path / "out"
    run("--init", tmp_path / "start", "--add", tmp_path / "add.model", "--out", out, "--new_rows", how)
    loaded = checkpoint.load(out)
    new, first = loaded.model.eval(), base.vocab_size
    assert loaded.tokenizer.vocab_size == new.args.vocab_size > first
    assert new.args.tie_embeddings == tied and (out / "checksums.json").exists()
    old_weights, new_weights = weights_of(model), weights_of(new)
    assert old_weights.keys() == new_weights.keys()
    for name, old in old_weights.items():
        assert torch.equal(new_weights[name][: len(old)], old), name
    tokens = torch.randint(0, first, (2, 30))
    assert (new(tokens)[..., :first] - model(tokens)).abs().max() < 1e-6
    for name in {"tok_embeddings.weight", "output.weight"} & old_weights.keys():
        check_new_rows(how, old_weights[name], new_weights[name][first:], base, loaded.tokenizer)


def check_new_rows(how: str, old, rows, base: ChatGLMTokenizer, new: ChatGLMTokenizer) -> None:
    if how == "random":
        assert 0.015 < rows.std() < 0.025 and rows.mean().abs() < 0.005
        return
    for i, row in enumerate(rows[:30]):
        text = new.sp.id_to_piece(base.vocab_size + i)
        ids = base.encode("\n" + text)[len(base.encode("\n")) :]  # a line break joins nothing here
        expected = old[ids].mean(0) if how == "subtokens" else old.mean(0)
        assert torch.allclose(row, expected, atol=1e-6), text


def test_rows_that_belong_to_no_token_make_room() -> None:
    model = small_model(20, False)
    weights, args = add_rows(model.state_dict(), model.args, 15, [[3], [4, 5]], "subtokens")
    table = model.tok_embeddings.weight
    assert args.vocab_size == 17 and torch.equal(weights["tok_embeddings.weight"][:15], table[:15])
    assert torch.allclose(weights["tok_embeddings.weight"][16], table[4:6].mean(0))
    assert torch.equal(weights["output.weight"][15], model.output.weight[3])


@pytest.mark.parametrize("tied", [True, False])
def test_loads_in_transformers(tmp_path, vocabulary, extra, tied) -> None:
    transformers = pytest.importorskip("transformers")
    base = ChatGLMTokenizer(vocabulary)
    save_model(tmp_path / "start", small_model(base.vocab_size, tied), base)
    (tmp_path / "add.model").write_bytes(extra)
    out, exported = tmp_path / "out", tmp_path / "hf"
    run("--init", tmp_path / "start", "--add", tmp_path / "add.model", "--out", out)
    script("export.py", "--model", out, "--out", exported)
    ours = checkpoint.load(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = ours.tokenizer.encode(DOMAIN)
    assert max(ids) >= base.vocab_size and tokenizer(DOMAIN)["input_ids"] == ids
    tokens = torch.tensor([ids[:60]])
    with torch.no_grad():
        assert (theirs(tokens).logits - ours.model.eval()(tokens)).abs().max() < 1e-4


def test_continues_pretraining(tmp_path, vocabulary, corpus, extra) -> None:
    base = ChatGLMTokenizer(vocabulary)
    save_model(tmp_path / "start", small_model(base.vocab_size, True), base)
    (tmp_path / "add.model").write_bytes(extra)
    out, data = tmp_path / "out", tmp_path / "tokens.bin"
    text = tmp_path / "domain.txt"
    text.write_text("\n".join(f"{DOMAIN}第{i}位" for i in range(200)), encoding="utf-8")
    done = script(
        "expand_vocab.py", "--init", tmp_path / "start", "--add", tmp_path / "add.model", "--out", out,
        "--text", text,
    )  # fmt: skip
    assert "domain.txt" in done.stdout
    report = json.loads((out / "train_config.json").read_text())["expansion"]
    counts = report["texts"][str(text)]
    assert counts["tokens_after"] < counts["tokens_before"] and counts["new_pieces_used"] >= 10
    script(
        "data_process.py", "--data", text, "--tokenizer", out / "tokenizer.model", "--out", data,
        "--valid", tmp_path / "valid.bin",
    )  # fmt: skip
    script(
        "pretrain.py", "--init", out, "--data", data, "--out", tmp_path / "run", "--max_steps", 12, "--micro_batch", 4,
        "--batch_tokens", 256, "--log_every", 1, "--precision", "fp32", "--sample_every", 0,
    )  # fmt: skip
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "log.jsonl").open()]
    losses = [loss for loss in losses if loss]
    assert losses[-1] < losses[0]


# --- what can go wrong ---


def test_errors_are_one_line(tmp_path, vocabulary, extra) -> None:
    (tmp_path / "add.model").write_bytes(extra)
    (tmp_path / "not.model").write_bytes(b"nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    base = ChatGLMTokenizer(vocabulary)
    save_model(tmp_path / "start", small_model(base.vocab_size, True), base)
    cases = [
        (
            ["--base", vocabulary, "--add", tmp_path / "not.model", "--out", tmp_path / "x.model"],
            "SentencePiece",
        ),
        (["--base", vocabulary, "--add", vocabulary, "--out", tmp_path / "x.model"], "没有可以追加的条目"),
        (["--init", tmp_path / "none", "--add", vocabulary, "--out", tmp_path / "x"], "找不到检查点"),
        (
            ["--init", tmp_path / "start", "--add", tmp_path / "add.model", "--out", tmp_path / "full"],
            "不会覆盖",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            run(*arguments)
    failed = script("expand_vocab.py", *cases[0][0], ok=False)
    assert len(failed.stderr.strip().splitlines()) == 1
    assert (tmp_path / "full" / "thesis.txt").exists() and not (tmp_path / "x.model").exists()
