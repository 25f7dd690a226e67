"""Exports of models with a vocabulary of Hugging Face's own: byte-level BPE as Llama 3's."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

import export
from exchange import llamacpp
from exchange.gguf_vocabulary import CUTTINGS
from model import ModelArgs, Transformer
from training import checkpoint

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = [
    "中国的首都是北京，1234567 人。", "Don't  stop:  I'M here\n\n\n  next\t\tline 3.14159",
    "😀 𠮷野家", " x", "繁體字 [abc] ==>\r\n",
]  # fmt: skip
LLAMA3 = next(pattern for pattern, name in CUTTINGS.items() if name == "llama-bpe")


def byte_level(pattern: str | None) -> Tokenizer:
    tokenizer = Tokenizer(BPE(ignore_merges=pattern is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [text * 3 for text in TEXTS] + ["the capital of China 中国人民"] * 5, trainer
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint with this vocabulary, as sft.py leaves it after --init with a Hugging Face folder."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    settings |= {"bos_token": SPECIALS[0], "eos_token": SPECIALS[4]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    rows = tokenizer.get_vocab_size(with_added_tokens=True) + 3  # padded, as many models are
    model = Transformer(
        ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=rows, max_seq_len=128)
    )
    weights = {name: value for name, value in model.state_dict().items() if name != "output.weight"}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(model.args)))
    return folder


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama3") / "saved", byte_level(LLAMA3))


def test_hugging_face_folder_keeps_tokenizer_and_template(tmp_path: Path, llama3: Path) -> None:
    from transformers import AutoTokenizer

    export.main(export.Config(model=llama3, out=tmp_path / "hf", verify=True))
    tokenizer = checkpoint.load(llama3).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.chat_template == TEMPLATE
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.special_tokens["<eos>"]


def test_gguf_holds_tokens_merges_and_the_name_of_the_cutting(tmp_path: Path, llama3: Path) -> None:
    export.main(export.Config(model=llama3, format="gguf", out=tmp_path / "m.gguf"))
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    saved = json.loads((llama3 / "tokenizer.json").read_text(encoding="utf-8"))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in saved["model"]["merges"]]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == checkpoint.load(llama3).model.args.vocab_size
    assert tokens[-8:] == [*SPECIALS, *(f"[PAD{i}]" for i in range(len(tokens) - 3, len(tokens)))]
    assert kinds[-8:] == [3] * 5 + [5] * 3
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|eot_id|>"
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert "TEMPLATE" not in (tmp_path / "m.Modelfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", list(CUTTINGS), ids=CUTTINGS.values())
def test_llama_cpp_gives_the_same_ids(tmp_path: Path, pattern: str | None) -> None:
    if (python := llamacpp.find_python()) is None:
        pytest.skip(f"no llama-cpp-python here, and {llamacpp.VARIABLE} names no Python that has it")
    saved = save(tmp_path / "saved", byte_level(pattern))
    export.main(export.Config(model=saved, format="gguf", out=tmp_path / "m.gguf", verify=True))
    tokenizer = checkpoint.load(saved).tokenizer
    answers = llamacpp.ask(python, tmp_path / "m.gguf", TEXTS)
    assert answers.ids == [tokenizer.encode(text) for text in TEXTS]


def test_unknown_cuttings_and_llama2c_are_refused(tmp_path: Path, llama3: Path) -> None:
    saved = save(tmp_path / "saved", byte_level(r"\s+|\w+|[^\s\w]+"))
    with pytest.raises(export.UserError, match="切分规则"):
        export.main(export.Config(model=saved, format="gguf", out=tmp_path / "m.gguf"))
    with pytest.raises(export.UserError, match="SentencePiece"):
        export.main(export.Config(model=llama3, format="llama2c", out=tmp_path / "m.bin"))
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}
