"""Hugging Face folders as models of ours: logits, vocabularies, context extensions, and the stages that take them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import script, streamed
from hf_folders import KINDS, L3_NAMES, write_llama, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
from chatglm_tokenizer.batch_encoder import BatchEncoder
from chatglm_tokenizer.chat import encode_chat
from chatglm_tokenizer.hf_tokenizer import HFTokenizer
from chatglm_tokenizer.load import load_tokenizer
from data_clean.texts import from_arrow
from exchange.hf_config import args_from_hf, hf_from_args
from exchange.hf_weights import from_hf, hf_name, meta_name, permute, to_hf, unpermute
from model import ModelArgs
from stage import UserError, parse
from training import checkpoint
from training.context import ContextConfig
from training.runtime import Runtime

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
L3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "plain": {},
    "all heads": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "other theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn, own numbers": {
        "rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}
    },
    "yarn, as DeepSeek": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": {**L3, "original_max_position_embeddings": 64}},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, object]]:
    """Of each kind of vocabulary its folder, and transformers' tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: (folder / kind, write_tokenizer(folder / kind, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(tokenizers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-3 in miniature: sharded, untied, grouped heads, rope scaling, more rows than the vocabulary needs."""
    path = tmp_path_factory.mktemp("models") / "Llama-3-tiny"
    shutil.copytree(tokenizers["llama3"][0], path)
    theirs = tokenizers["llama3"][1]
    stop = theirs.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    write_llama(
        path, shard="200KB", vocab_size=len(theirs) + 3, eos_token_id=stop, bos_token_id=theirs.bos_token_id,
        **SHAPES["llama3"],
    )  # fmt: skip
    return path


def differences(ours, theirs, length: int = 120) -> float:
    """The largest difference of logits on random tokens."""
    tokens = torch.randint(0, theirs.config.vocab_size, (2, length), generator=torch.manual_seed(1))
    with torch.no_grad():
        return float((ours.eval()(tokens) - theirs(tokens).logits).abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers_and_go_back(name: str, tokenizers, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = write_llama(tmp_path / "hf", **SHAPES[name])
    loaded = checkpoint.load(tmp_path / "hf", tokenizer=small_vocabulary(tmp_path))
    assert differences(loaded.model, theirs) < 1e-4
    back = LlamaForCausalLM(LlamaConfig(**hf_from_args(loaded.model.args))).eval()
    weights = to_hf(dict(loaded.model.state_dict()), loaded.model.args)
    missing, unexpected = back.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert differences(loaded.model, back) < 1e-4
    assert all(torch.equal(weights[key], theirs.state_dict()[key]) for key in weights)
    assert from_hf(weights, loaded.model.args).keys() == {meta_name(key) for key in weights}


def small_vocabulary(folder: Path) -> Path:
    """A vocabulary of a few words, as the weights alone are looked at."""
    from tokenizers import Tokenizer, models

    (folder / "words").mkdir()
    words = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", "a", "b"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "words" / "tokenizer.json"))
    (folder / "words" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder / "words"


def test_sharded_folders_in_half_precision_and_older_files(tmp_path: Path, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    assert len(list(folder.glob("model-*.safetensors"))) > 2
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    assert differences(checkpoint.load(folder).model, theirs) < 1e-4
    old = tmp_path / "old"
    words = small_vocabulary(tmp_path)
    theirs = write_llama(old, safe=False)
    assert differences(checkpoint.load(old, tokenizer=words).model, theirs) < 1e-4
    write_llama(tmp_path / "half").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    model = checkpoint.load(tmp_path / "half", tokenizer=words).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # to be trained
    assert differences(model, half) < 1e-4


def test_a_tied_matrix_is_stored_under_either_name_or_is_none(tmp_path: Path) -> None:
    """Only lm_head as safetensors' save_model leaves it; and two matrices beside a config.json that says one."""
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    words = small_vocabulary(tmp_path)
    write_llama(tmp_path / "hf", tie_word_embeddings=True)
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    table = weights.pop("model.embed_tokens.weight")
    for stored, is_tied in (
        ({"lm_head.weight": table}, True),
        ({"lm_head.weight": table, "model.embed_tokens.weight": table.clone()}, True),
        ({"lm_head.weight": -table, "model.embed_tokens.weight": table}, False),
    ):
        save_file(weights | stored, path, {"format": "pt"})
        ours = checkpoint.load(tmp_path / "hf", tokenizer=words).model
        assert ours.args.tie_embeddings == is_tied
        assert differences(ours, LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()) < 1e-4


def test_what_our_model_does_not_compute_is_refused(tmp_path: Path) -> None:
    good = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 10,
    }  # fmt: skip
    assert args_from_hf(good, tmp_path) == ModelArgs(
        dim=64, n_layers=1, n_heads=4, vocab_size=10, hidden_dim=96, norm_eps=1e-6, max_seq_len=2048,
        tie_embeddings=False,
    )  # fmt: skip
    mistral = good | {"model_type": "mistral", "num_key_value_heads": 2, "max_position_embeddings": 8192}
    assert args_from_hf(mistral | {"sliding_window": None}, tmp_path).n_kv_heads == 2
    with pytest.raises(UserError, match="滑动窗口"):  # which a Mistral has unless it says otherwise
        args_from_hf(mistral, tmp_path)
    bad = {
        "qwen2": {"model_type": "qwen2"},
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "quantization_config": {"quantization_config": {"bits": 4}},
        "滑动窗口": {"model_type": "mistral", "sliding_window": 512, "max_position_embeddings": 1024},
        "longrope": {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "needs factor": {"rope_scaling": {"rope_type": "linear"}},
        "high_freq_factor": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "partial_rotary_factor": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "缺少 hidden_size": {"hidden_size": None},
        "n_heads": {"num_attention_heads": 3},
    }
    for reason, change in bad.items():
        with pytest.raises(UserError, match=reason):
            args_from_hf(good | change, tmp_path)


def test_configs_of_every_age_say_the_same(tmp_path: Path) -> None:
    shape = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 10, "max_position_embeddings": 128,
    }  # fmt: skip
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32}
    forms = [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "type": "yarn", **scaling, "mscale": None}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling, "factor": None}},
    ]
    found = [args_from_hf(shape | form, tmp_path) for form in forms]
    assert all(args == found[0] for args in found)
    assert found[0].rope_scaling == {"rope_type": "yarn", **scaling}
    assert args_from_hf(
        shape | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, tmp_path
    ) == (args_from_hf(shape, tmp_path))


def test_names_and_rows_go_there_and_back() -> None:
    inside = (
        "11.attention.wq.weight",
        "0.ffn_norm.weight",
        "3.feed_forward.w2.lora_A.weight",
        "3.attention.wo",
    )
    outside = ("tok_embeddings.weight", "output.weight", "norm.weight")
    for name in (*outside, *(f"layers.{rest}" for rest in inside)):
        assert meta_name(hf_name(name)) == name
    for name in ("layers.0.attention.wx", "model.layers.0.self_attn.rotary_emb.inv_freq", "norms.weight"):
        with pytest.raises(KeyError):
            hf_name(name)
    weight = torch.randn(24, 5)
    assert torch.equal(unpermute(permute(weight, 3), 3), weight)
    assert not torch.equal(permute(weight, 3), weight)


# A longer context.


@pytest.mark.parametrize(
    "scaling", ["linear:2", "yarn:4", "llama3:4", json.dumps({**YARN, "beta_fast": 8.0})]
)
def test_an_extended_context_is_that_of_transformers(scaling: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    write_llama(tmp_path / "hf")
    change = ContextConfig(rope_scaling=scaling).extend
    model = checkpoint.load(tmp_path / "hf", tokenizer=small_vocabulary(tmp_path), change=change).model
    assert model.args.max_seq_len in (256, 512)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= hf_from_args(model.args)
    del config["rope_parameters"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert differences(model, LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval(), 250) < 1e-4


def test_dynamic_scaling_is_the_base_that_transformers_uses_at_that_length(tmp_path: Path) -> None:
    """Transformers changes the base with the length of each text; at the full new length both agree."""
    theirs = write_llama(tmp_path / "hf", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    words = small_vocabulary(tmp_path)
    for cfg in (ContextConfig(max_seq_len=300), ContextConfig(max_seq_len=300, rope_scaling="dynamic:2")):
        model = checkpoint.load(tmp_path / "hf", tokenizer=words, change=cfg.extend).model
        assert model.args.rope_scaling is None and model.args.rope_theta > 10000
        assert differences(model, theirs, 300) < 1e-4


def test_settings_of_the_context() -> None:
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=10, max_seq_len=128)
    assert ContextConfig().extend(args) == args
    assert ContextConfig(rope_theta=1e6, max_seq_len=512).extend(args).rope_theta == 1e6
    with pytest.raises(UserError, match="at least 1"):
        ContextConfig(rope_scaling="yarn:0.5").extend(args)
    yarn = ContextConfig(rope_scaling="yarn:4").extend(args)
    assert yarn.max_seq_len == 512 and yarn.rope_scaling["original_max_position_embeddings"] == 128
    assert ContextConfig(max_seq_len=256).extend(yarn).rope_scaling == yarn.rope_scaling
    assert ContextConfig(rope_scaling="none").extend(yarn).rope_scaling is None
    again = ContextConfig(rope_scaling="yarn:8", max_seq_len=1024).extend(yarn)
    assert again.rope_scaling == {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}
    with pytest.raises(UserError, match="max_seq_len"):
        ContextConfig(rope_scaling="yarn:8").extend(yarn)
    for text in ("yarn", "longrope:2", "linear:0", "linear:-1", "{", '{"rope_type": "yarn"}', "[1]"):
        with pytest.raises(UserError, match="rope_scaling"):
            ContextConfig(rope_scaling=text).check()


# Vocabularies.

TEXT = st.text(
    alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("<|>/s é中文🙂 \n"))
)
NAMES = st.sampled_from(
    [*L3_NAMES, "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|", "</s", "<0x0A>"]
)
MIXED = st.lists(st.one_of(TEXT, NAMES), max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(MIXED, max_size=3))
def test_any_text_stays_text_and_comes_back(tokenizers, texts: list[str]) -> None:
    for kind, (path, theirs) in tokenizers.items():
        tokenizer = cached(path)
        rows = tokenizer.encode_batch(texts)
        assert rows == [tokenizer.encode(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            assert not tokenizer.names.keys() & set(row)
            plain = text.replace("▁", " ")  # SentencePiece's own sign for a space
            assert tokenizer.decode(row) == (text if kind in ("llama3", "chatml") else plain)
            assert "".join(streamed(tokenizer, row)) == tokenizer.decode(row)
            if not tokenizer.control.search(text):
                assert row == theirs.encode(text, add_special_tokens=False)
            if row and kind in ("llama3", "chatml"):
                assert tokenizer.bytes_per_token()[row].sum() == len(text.encode())


CACHE: dict[Path, HFTokenizer] = {}


def cached(path: Path) -> HFTokenizer:
    return CACHE.setdefault(path, load_tokenizer(path))


def test_ids_and_files_of_a_vocabulary(tokenizers, folder: Path, tmp_path: Path) -> None:
    theirs = tokenizers["llama3"][1]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == len(theirs) == tokenizer.least_rows
    assert tokenizer.special_tokens == {"<bos>": theirs.bos_token_id, "<eos>": theirs.eos_token_id}
    assert set(tokenizer.stop_ids) == set(theirs.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    for name in ("special_tokens", "stop_ids", "chat_template", "sha256", "files"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert load_tokenizer(tmp_path / "tokenizer.json").sha256 == tokenizer.sha256
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(ValueError, match="outside"):
        tokenizer.decode([tokenizer.vocab_size])


def test_transformers_reads_an_imported_vocabulary_as_it_was(tokenizers, tmp_path: Path) -> None:
    """Of a LlamaTokenizer transformers 5 keeps the pieces alone, and puts spaces by rules of its own."""
    from transformers import AutoTokenizer

    shutil.copytree(tokenizers["llama2"][0], tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer", "legacy": False}
    path.write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path / "hf")
    (tmp_path / "ours").mkdir()
    for name, content in ours.files.items():
        (tmp_path / "ours" / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    messages = [{"role": "user", "content": " two  spaces"}, {"role": "assistant", "content": "好"}]
    expected = tokenizers["llama2"][1].apply_chat_template(messages)["input_ids"]
    assert theirs.apply_chat_template(messages)["input_ids"] == expected
    assert encode_chat(messages, ours, 999)[0] == expected


def test_folders_whose_vocabulary_is_of_no_use(tmp_path: Path, tokenizers) -> None:
    with pytest.raises(UserError, match="没有词表"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json 已损坏"):
        load_tokenizer(tmp_path)
    shutil.copy(tokenizers["llama3"][0] / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="没有说明结束符"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="不是 JSON"):
        load_tokenizer(tmp_path)
    # A padding token that was added without making the embedding longer is never needed.
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    size = load_tokenizer(tokenizers["llama3"][0]).vocab_size
    content["added_tokens"].append({**content["added_tokens"][-1], "id": size, "content": "[PAD]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end_of_text|>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.least_rows) == (size + 1, size - 3)
    assert tokenizer.special_tokens["<bos>"] == tokenizer.special_tokens["<eos>"]


def test_a_corpus_is_encoded_like_its_texts(tokenizers) -> None:
    texts = ["床前明月光，疑是地上霜。", "", "see <|eot_id|> and </s>", "a  b\n\nc"]
    for path, _ in tokenizers.values():
        tokenizer = cached(path)
        ids, counts = BatchEncoder(tokenizer).encode(from_arrow(pa.array(texts, pa.large_string())))
        rows = [tokenizer.encode(text) + [tokenizer.special_tokens["<eos>"]] for text in texts]
        assert ids.tolist() == [i for row in rows for i in row] and counts.tolist() == [
            len(row) for row in rows
        ]
        assert ids.dtype == np.uint16


# The stages.


@pytest.fixture(scope="module")
def imported_tokens(corpus: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "pretrain.bin"
    script(
        "data_process.py", "--data", corpus / "raw" / "C4_zh", "--tokenizer", folder, "--out", out,
        "--valid", out.with_name("valid.bin"), "--no_find_bin",
    )  # fmt: skip
    return out


def few_steps(folder: Path, tokens: Path, out: Path, *more: object) -> list[object]:
    return [
        "--init", folder, "--data", tokens, "--valid", tokens.with_name("valid.bin"), "--out", out,
        "--precision", "fp32", "--batch_tokens", 1024, "--micro_batch", 4, "--max_seq_len", 64,
        "--eval_every", 0, "--eval_tokens", 2000, *more,
    ]  # fmt: skip


TWELVE = ["--max_steps", 12, "--lr", 3e-3, "--log_every", 1, "--save_every", 5, "--keep_last", 9]


@pytest.fixture(scope="module")
def continued(folder: Path, imported_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported model after some steps of continued pretraining."""
    out = tmp_path_factory.mktemp("continued") / "out"
    script("pretrain.py", *few_steps(folder, imported_tokens, out), *TWELVE)
    return out


def test_continued_pretraining_learns_and_keeps_shape_and_vocabulary(
    continued: Path, folder: Path, imported_tokens: Path
) -> None:
    sidecar = json.loads(imported_tokens.with_suffix(".json").read_text(encoding="utf-8"))
    before, after = load_tokenizer(folder), checkpoint.load(continued)
    assert sidecar["tokenizer"]["sha256"] == before.sha256 == after.tokenizer.sha256
    assert after.tokenizer.files == before.files and isinstance(after.tokenizer, HFTokenizer)
    assert after.model.args.rope_scaling["rope_type"] == "llama3" and after.model.args.max_seq_len == 64
    rows = [json.loads(line) for line in (continued / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2
    settings = json.loads((after.path / "train_config.json").read_text(encoding="utf-8"))
    assert (settings["recipe"], settings["optimizer"], settings["schedule"]) == (
        "continued",
        "adamw",
        "cosine",
    )
    assert {"tokenizer.json", "tokenizer_config.json"} <= json.loads(
        (after.path / "checksums.json").read_text()
    ).keys()


def test_continued_pretraining_resumes_bit_for_bit(
    continued: Path, folder, imported_tokens, tmp_path
) -> None:
    shutil.copytree(continued, tmp_path / "out")
    for step in (10, 12):
        shutil.rmtree(tmp_path / "out" / f"step_{step:08d}")
    again = script("pretrain.py", *few_steps(folder, imported_tokens, tmp_path / "out"), *TWELVE, "--resume")
    assert "从第 5 步开始" in again.stdout
    weights = [checkpoint.load(out).model.state_dict() for out in (continued, tmp_path / "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_settings_that_do_not_go_together_are_refused(
    folder: Path, imported_tokens: Path, tokens: Path, tmp_path
) -> None:
    options = few_steps(folder, imported_tokens, tmp_path / "out", "--max_steps", 1)
    for more, reason in (
        (["--model", "92M"], "--model 不能与 --init 同用"),
        (["--dim", 128], "--dim 不能与 --init 同用"),
        (["--rope_scaling", "yarn:2:3"], "--rope_scaling yarn:2:3 不可用"),
        (["--rope_scaling", "longrope:2"], "rope_type must be one of"),
        (["--rope_theta", 0.5], "--rope_theta 必须大于 1"),
    ):
        with pytest.raises(UserError, match=reason):
            parse(pretrain.Config, [*map(str, options), *map(str, more)])
    # Tokens of another vocabulary than the model's.
    failed = script("pretrain.py", *few_steps(folder, tokens, tmp_path / "out"), ok=False)
    assert "不同" in failed.stderr
    estimate = script("pretrain.py", *options, "--estimate").stdout
    assert "参数" in estimate and not (tmp_path / "out").exists()


def test_a_validation_file_of_less_than_a_window_is_not_used(
    vocabulary: Path, tmp_path: Path, capsys
) -> None:
    valid, tokenizer = tmp_path / "valid.bin", load_tokenizer(vocabulary)
    np.full(200, 5, np.uint32).tofile(valid)
    valid.with_suffix(".json").write_text('{"dtype": "uint32"}')
    args, runtime = ModelArgs(dim=8, n_heads=2, max_seq_len=256), Runtime(torch.device("cpu"), torch.float32)
    evaluate = pretrain.make_evaluate(
        parse(pretrain.Config, ["--valid", str(valid)]), args, tokenizer, runtime
    )
    assert evaluate(None) == {} and "不足一个窗口" in capsys.readouterr().out


def test_a_new_model_takes_the_settings_of_its_context(tokens: Path, tmp_path: Path) -> None:
    script(
        "pretrain.py", "--data", tokens, "--valid", tokens.with_name("valid.bin"), "--out", tmp_path / "out",
        "--model", "demo", "--dim", 64, "--n_layers", 1, "--max_seq_len", 64, "--rope_theta", 50000, "--max_steps", 1,
        "--rope_scaling", "yarn:2", "--batch_tokens", 128, "--eval_tokens", 200,
    )  # fmt: skip
    args = checkpoint.load(tmp_path / "out").model.args
    assert (args.max_seq_len, args.rope_theta) == (64, 50000)
    assert args.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}


def test_instructions_are_learnt_in_the_format_of_the_model(
    continued: Path, folder: Path, tmp_path: Path
) -> None:
    csv = tmp_path / "sft.csv"
    lines = [f'{i} 加 1 等于几？,"等于 {i + 1}。"' for i in range(60)]
    csv.write_text("prompt,answer\n" + "\n".join(lines) + "\n", encoding="utf-8")
    options = [
        "--init", folder, "--data", csv, "--out", tmp_path / "out", "--batch", 20, "--max_steps", 12, "--lr", 3e-3,
        "--min_lr", 1e-4, "--precision", "fp32", "--log_every", 1, "--rope_scaling", "none", "--max_seq_len", 96,
    ]  # fmt: skip
    script("sft.py", *options)
    rows = [
        json.loads(row) for row in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    after = checkpoint.load(tmp_path / "out")
    assert (after.model.args.max_seq_len, after.model.args.rope_scaling) == (96, None)
    assert after.tokenizer.chat_template == load_tokenizer(folder).chat_template
    answered = script(
        "eval.py", "--model", tmp_path / "out", "--questions", "1 加 1 等于几？", "--max_new_tokens", 8
    )
    assert "答：" in answered.stdout
    more = ["--init", continued, "--out", tmp_path / "again", "--max_steps", 1]  # from a checkpoint of ours
    script("sft.py", *options, *more)


def test_damaged_folders_give_one_clear_line(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    with pytest.raises(UserError, match=f"所在的文件夹 {broken}"):
        checkpoint.load(shard)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="下载不完整"):
        checkpoint.load(broken)
    shard.unlink()
    with pytest.raises(UserError, match=f"缺少权重文件 {shard.name}"):
        checkpoint.load(broken)
    (broken / "model.safetensors.index.json").unlink()
    for other in broken.glob("model-*.safetensors"):
        other.unlink()
    with pytest.raises(UserError, match="没有权重"):
        checkpoint.load(broken)
    (broken / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that runs a command
    with pytest.raises(UserError, match="save_pretrained"):
        checkpoint.load(broken)
    failed = script("sft.py", "--init", broken, "--data", "x.csv", "--out", tmp_path / "out", ok=False)
    assert failed.stderr.startswith("错误：") and failed.stderr.count("\n") == 1
