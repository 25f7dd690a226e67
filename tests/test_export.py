"""export.py against the programs that it exports for: transformers, the gguf package, llama.cpp, llama2.c."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from gguf import GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from chatglm_tokenizer.chat import CHAT_TEMPLATE, encode_chat, encode_prompt
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange import check, llamacpp
from exchange.hf_tokenizer_file import write_tokenizer
from model import ModelArgs, Transformer
from training import checkpoint

NO_LIMIT = 10**9
NAMES = ("<unk>", "<s>", "</s>")  # what AutoTokenizer takes for control tokens wherever they stand
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=50).filter(
    lambda text: not any(name in text for name in NAMES)
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def save_checkpoint(folder: Path, vocabulary: Path, **shape: object) -> Path:
    """A checkpoint of a random model that is far from the symmetric initialisation."""
    tokenizer = ChatGLMTokenizer(vocabulary)
    torch.manual_seed(0)
    shape = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256, **shape}
    model = Transformer(ModelArgs(vocab_size=tokenizer.vocab_size, **shape))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    weights = model.state_dict()
    if model.args.tie_embeddings:
        del weights["output.weight"]
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(model.args)))
    (folder / "tokenizer.model").write_bytes(tokenizer.content)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "saved", vocabulary)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Path:
    """The export of that checkpoint, through the command line and its own check."""
    out = tmp_path_factory.mktemp("export") / "hf"
    done = script("export.py", "--model", saved, "--format", "hf", "--out", out, "--check")
    assert done.stdout.count("通过") == 3, done.stdout
    return out


@pytest.fixture(scope="module", params=["own", "chatglm2"])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Our tokenizer, and what AutoTokenizer makes of its files."""
    from transformers import AutoTokenizer

    if request.param == "own":
        ours = ChatGLMTokenizer(request.getfixturevalue("vocabulary"))
    else:
        ours = request.getfixturevalue("chatglm2")
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, ours, ours.vocab_size, 10**6, CHAT_TEMPLATE)
    return ours, AutoTokenizer.from_pretrained(folder)


def load_both(checkpoint_folder: Path, exported: Path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    return checkpoint.load(checkpoint_folder).model.eval(), theirs


def assert_same_logits(ours: Transformer, theirs) -> None:
    tokens = torch.randint(3, ours.args.vocab_size, (2, ours.args.max_seq_len))
    with torch.inference_mode():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_transformers_gives_our_logits_and_greedy_text(saved: Path, hugging_face: Path) -> None:
    ours, theirs = load_both(saved, hugging_face)
    assert_same_logits(ours, theirs)
    prompt = torch.randint(3, ours.args.vocab_size, (1, 30))
    expected = theirs.generate(prompt, max_new_tokens=200, eos_token_id=None)[0, 30:].tolist()
    assert len(expected) == 200
    assert ours.generate(prompt.tolist(), 200, temperature=0) == [expected]


def test_generation_config_and_ids(hugging_face: Path) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(hugging_face)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert not config.do_sample


@pytest.mark.parametrize(
    "shape",
    [
        {"rope_scaling": YARN, "tie_embeddings": False},
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 32},
    ],
)
def test_scaled_positions_and_wide_heads_reach_transformers(tmp_path: Path, vocabulary: Path, shape: dict):
    import export

    saved = save_checkpoint(tmp_path / "saved", vocabulary, **shape)
    export.main(export.Config(model=saved, out=tmp_path / "hf"))
    assert_same_logits(*load_both(saved, tmp_path / "hf"))


def test_shards_and_bf16(tmp_path: Path, saved: Path) -> None:
    import export

    export.main(export.Config(model=saved, out=tmp_path / "hf", dtype="bf16", shard_gb=0.0002, verify=True))
    files = list((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 1
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.bfloat16}


def test_ids_of_every_line_of_real_instructions(shared: Path, chatglm2: ChatGLMTokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, chatglm2, chatglm2.vocab_size, 10**6, CHAT_TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    files = sorted((shared / "sft").iterdir())
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines(keepends=True)]
    assert len(lines) > 10_000
    for start in range(0, len(lines), 2000):
        part = lines[start : start + 2000]
        assert theirs(part, verbose=False)["input_ids"] == chatglm2.encode_batch(part)


AWKWARD = [
    "", " ", "   三个空格  两个 ", "\t制表\t符", "换行\n\n两次\r\n", "Ａｂｃ１２３全角　空格", "😀👨‍👩‍👧🇨🇳", "[gMASK]sop Philosophy",
    "a\0b\x01\x7f", "繁體字與𠮷野家龘", "é e\u0301", "\ufeff零宽\u200b", "▁下划线▁", "<eos> <bos> <pad>", "<0x41>", "한국어 ไทย",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(text=TEXT | st.sampled_from(AWKWARD))
def test_any_text_has_equal_ids_and_comes_back(tokenizers, text: str) -> None:
    ours, theirs = tokenizers
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


def test_names_of_control_tokens_in_text(tokenizers) -> None:
    """AutoTokenizer takes them for the tokens, as for every model, unless told otherwise; ours never does."""
    ours, theirs = tokenizers
    text = "划掉<s>这个</s>"
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert theirs(text)["input_ids"] == [*ours.encode("划掉"), 1, *ours.encode("这个"), 2]


@settings(max_examples=100, deadline=None)
@given(system=st.none() | TEXT, turns=st.lists(TEXT.filter(bool), min_size=1, max_size=5))
def test_template_gives_the_ids_of_chat(tokenizers, system: str | None, turns: list[str]) -> None:
    ours, theirs = tokenizers
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if len(turns) % 2:
        assert ids == encode_prompt(messages, ours, NO_LIMIT)
    else:
        assert ids == encode_chat(messages, ours, NO_LIMIT)[0]


def test_template_refuses_roles_out_of_order(tokenizers) -> None:
    with pytest.raises(Exception, match="alternate"):
        tokenizers[1].apply_chat_template([{"role": "assistant", "content": "你好"}])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_gguf_read_back_by_the_gguf_package(tmp_path: Path, saved: Path, dtype: str) -> None:
    import export

    out = tmp_path / "model.gguf"
    export.main(export.Config(model=saved, format="gguf", dtype=dtype, out=out))
    loaded = checkpoint.load(saved)
    reader = GGUFReader(out)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 256
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.add_space_prefix"]
    sp = loaded.tokenizer.sp
    assert fields["tokenizer.ggml.tokens"] == [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    assert np.allclose(fields["tokenizer.ggml.scores"], [sp.get_score(i) for i in range(sp.vocab_size())])
    tensors = {t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(tensors) == 2 + 9 * 3
    weights = loaded.model.state_dict()
    largest = {"f32": 0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 5e-3, "q5_1": 0.04, "q5_0": 0.065}.get(
        dtype, 0.13
    )
    for ours, theirs in {
        "layers.2.attention.wk.weight": "blk.2.attn_k.weight",
        "layers.1.feed_forward.w1.weight": "blk.1.ffn_gate.weight",
        "layers.0.ffn_norm.weight": "blk.0.ffn_norm.weight",
        "tok_embeddings.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
    }.items():
        weight = weights[ours].numpy()
        error = np.abs(tensors[theirs] - weight).max()
        assert error <= largest * np.abs(weight).max(), ours


def test_gguf_rows_that_no_block_divides_stay_f16(tmp_path: Path, vocabulary: Path) -> None:
    saved = save_checkpoint(tmp_path / "saved", vocabulary, hidden_dim=72)
    out = tmp_path / "model.gguf"
    done = script(
        "export.py", "--model", saved, "--format", "gguf", "--dtype", "q8_0", "--out", out, "--check",
        env={**os.environ, llamacpp.VARIABLE: ""},
    )  # fmt: skip
    assert "3 个矩阵" in done.stdout  # w2 of each layer
    assert "没有 llama-cpp-python" in done.stdout or "llama.cpp 分词" in done.stdout
    ollama = out.with_suffix(".Modelfile").read_text(encoding="utf-8")
    assert ollama.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert "num_ctx 256" in ollama


def test_specials_of_chatglm2_are_not_merged_from_text_in_gguf(chatglm2: ChatGLMTokenizer) -> None:
    from chatglm_tokenizer.model_file import read_model
    from exchange.gguf_vocabulary import unreachable
    from exchange.pieces import piece_names

    model = read_model(chatglm2.content)
    names = piece_names(chatglm2, model, 64793)
    safe = unreachable(names, model.kinds + [5] * 4)
    assert [(a, b) for a, b in zip(names, safe, strict=True) if a != b] == [("sop", "<|sop|>")]


@pytest.fixture(scope="module")
def llama_cpp() -> str:
    if (python := llamacpp.find_python()) is None:
        pytest.skip(f"no llama-cpp-python here, and {llamacpp.VARIABLE} names no Python that has it")
    return python


@pytest.mark.parametrize(
    "shape", [{}, {"rope_scaling": LLAMA3, "tie_embeddings": False}, {"rope_scaling": YARN}]
)
def test_llama_cpp_gives_our_logits_ids_and_greedy_text(
    tmp_path: Path, vocabulary: Path, llama_cpp: str, shape: dict
) -> None:
    import export

    saved = save_checkpoint(tmp_path / "saved", vocabulary, **shape)
    export.main(export.Config(model=saved, format="gguf", out=tmp_path / "m.gguf", verify=True))
    loaded = checkpoint.load(saved)
    model = loaded.model.eval()
    prompts = [loaded.tokenizer.encode(text) for text in ("中国的首都是", "感冒了应该怎么办？")]
    texts = [*AWKWARD[1:], "Hello 世界"]
    answers = llamacpp.ask(llama_cpp, tmp_path / "m.gguf", texts, prompts, new=200, stop=[2])
    texts_without_nul = [i for i, text in enumerate(texts) if "\0" not in text]
    assert [answers.ids[i] for i in texts_without_nul] == [
        loaded.tokenizer.encode(texts[i]) for i in texts_without_nul
    ]
    assert answers.greedy == model.generate(prompts, 200, temperature=0, stop_ids=[2])
    for prompt, logits in zip(prompts, answers.logits, strict=True):
        assert np.abs(check.logits_of(model, [prompt])[0] - logits).max() < 1e-3


def test_llama_cpp_takes_the_template_as_chat_does(tmp_path: Path, saved: Path, llama_cpp: str) -> None:
    import export
    import jinja2

    export.main(export.Config(model=saved, format="gguf", out=tmp_path / "m.gguf"))
    tokenizer = checkpoint.load(saved).tokenizer
    texts = [
        jinja2.Template(CHAT_TEMPLATE).render(messages=d, bos_token="<s>", eos_token="</s>")
        for d in check.DIALOGUES
    ]
    answers = llamacpp.ask(llama_cpp, tmp_path / "m.gguf", texts, special=True)
    assert answers.ids == [encode_prompt(d, tokenizer, NO_LIMIT) for d in check.DIALOGUES]
    assert answers.template == CHAT_TEMPLATE


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c(tmp_path: Path, vocabulary: Path, tied: bool) -> None:
    """The file's own reader; with LLAMA2C_RUN naming a compiled run.c, its greedy text too."""
    saved = save_checkpoint(tmp_path / "saved", vocabulary, tie_embeddings=tied)
    out = tmp_path / "model.bin"
    done = script("export.py", "--model", saved, "--format", "llama2c", "--out", out, "--check")
    assert done.stdout.count("通过") == 2
    loaded = checkpoint.load(saved)
    header = np.fromfile(out, "<i4", 7).tolist()
    assert header[:5] == [64, loaded.model.args.hidden_dim, 3, 4, 2]
    assert header[5:] == [2500 if tied else -2500, 256]
    if not (run := os.environ.get("LLAMA2C_RUN")):
        pytest.skip("LLAMA2C_RUN names no compiled run.c of llama2.c")
    prompt = [1, *loaded.tokenizer.encode("中国的首都  是<s>x𠮷")]
    new = loaded.model.eval().generate([prompt], 100, temperature=0, stop_ids=[1])[0]
    command = [
        run,
        str(out),
        "-z",
        str(tmp_path / "tokenizer.bin"),
        "-t",
        "0",
        "-n",
        str(len(prompt) + len(new) - 1),
    ]
    command += ["-i", "中国的首都  是<s>x𠮷"]
    printed = subprocess.run(command, capture_output=True).stdout
    assert printed == llama2c_text(loaded.tokenizer, [*prompt, *new]) + b"\n"


def llama2c_text(tokenizer: ChatGLMTokenizer, ids: list[int]) -> bytes:
    """What run.c prints: the pieces one by one, without the first space, and no byte that is not printable."""
    text = b""
    for before, i in zip(ids, ids[1:], strict=False):
        piece = tokenizer.sp.id_to_piece(i)
        if tokenizer.sp.is_byte(i):
            byte = bytes([int(piece[3:5], 16)])
            text += byte if byte in b"\t\n\v\f\r" or b" " <= byte < b"\x7f" else b""
            continue
        piece = f"\n{piece}\n" if i in (1, 2) else piece.replace("▁", " ")
        text += (piece[1:] if before == 1 and piece.startswith(" ") else piece).encode()
    return text


def test_pth_loads_strictly_where_the_original_names_are_known(tmp_path: Path, saved: Path) -> None:
    out = tmp_path / "model.pth"
    done = script("export.py", "--model", saved, "--format", "pth", "--out", out, "--check")
    assert "ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2" in done.stdout
    state = torch.load(out, weights_only=True)
    assert {"tok_embeddings.weight", "output.weight", "norm.weight", "layers.2.attention.wq.weight"} <= set(
        state
    )
    assert {value.dtype for value in state.values()} == {torch.float32}
    model = checkpoint.load(saved).model
    Transformer(model.args).load_state_dict(state, strict=True)
    again = script(
        "eval_pretrain.py", "--model", out, "--n_heads", 4, "--tokenizer", saved / "tokenizer.model",
        "--max_new_tokens", 3, "--prompts", "中国",
    )  # fmt: skip
    assert "【中国】" in again.stdout


def test_a_wrong_export_fails_its_check(tmp_path: Path, saved: Path, hugging_face: Path) -> None:
    """Rows of q_proj in Meta's order are the classic mistake."""
    loaded = checkpoint.load(saved)
    wrong = tmp_path / "wrong"
    shutil.copytree(hugging_face, wrong)
    weights = load_file(wrong / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = loaded.model.layers[0].attention.wq.weight.data
    save_file(weights, wrong / "model.safetensors", {"format": "pt"})
    fast = json.loads((wrong / "tokenizer.json").read_text(encoding="utf-8"))
    fast["model"]["merges"] = fast["model"]["merges"][100:]
    (wrong / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    found = check.check_hf(wrong, loaded.model.eval(), loaded.tokenizer, CHAT_TEMPLATE, "float32")
    assert [finding.ok for finding in found][:2] == [False, False]


def test_what_stands_there_is_not_overwritten(tmp_path: Path, saved: Path, hugging_face: Path) -> None:
    arguments = ["--model", saved, "--format", "hf", "--out"]
    assert "--overwrite" in script("export.py", *arguments, hugging_face, ok=False).stderr
    script("export.py", *arguments, hugging_face, "--overwrite")
    assert not list(hugging_face.parent.glob(".*"))
    # The checkpoint itself and a folder of something else.
    shutil.copytree(saved, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for folder in (saved.parent, tmp_path / "mine"):
        done = script("export.py", *arguments, folder, "--overwrite", ok=False)
        assert "还有别的内容" in done.stderr
    assert (tmp_path / "mine" / "notes.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "hf", "--dtype", "q8_0"], "f32、f16、bf16"),
        (["--format", "llama2c", "--dtype", "f16"], "只能是 f32"),
        (["--format", "gguf", "--out", "model.bin"], "应以 .gguf 结尾"),
        (["--model", "nowhere"], "找不到检查点"),
    ],
)
def test_unusable_settings_are_one_line(tmp_path: Path, saved: Path, arguments: list, message: str) -> None:
    done = script("export.py", "--model", saved, *arguments, ok=False, cwd=tmp_path)
    assert message in done.stderr
    assert done.stderr.startswith("错误：")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "suffix"), [("llama2c", "bin"), ("pth", "pth")])
def test_shapes_that_a_format_cannot_say_are_refused(
    tmp_path: Path, vocabulary: Path, kind: str, suffix: str
):
    import export

    saved = save_checkpoint(tmp_path / "saved", vocabulary, rope_theta=5e5, rope_scaling=LLAMA3, head_dim=32)
    out = tmp_path / "out" / f"model.{suffix}"
    with pytest.raises(export.UserError, match=r"(?s)rope_theta=500000.*rope_scaling.*每头宽 32"):
        export.main(export.Config(model=saved, format=kind, out=out))
    assert not out.exists()


def test_vocabularies_that_merges_do_not_describe_are_refused(
    tmp_path: Path, saved: Path, corpus: Path
) -> None:
    import sentencepiece

    import export

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"第{i}句 中国的首都是北京，人口很多。" for i in range(2000)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "uni"), vocab_size=60, model_type="unigram", minloglevel=2,
        pad_id=-1, unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    for kind, out in {"hf": "hf", "gguf": "m.gguf", "llama2c": "m.bin"}.items():
        config = export.Config(model=saved, format=kind, out=tmp_path / out, tokenizer=tmp_path / "uni.model")
        with pytest.raises(export.UserError, match="普通 BPE"):
            export.main(config)
        assert not (tmp_path / out).exists()
