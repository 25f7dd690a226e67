"""The vocabulary part of a GGUF file: SentencePiece's pieces with their scores, or byte-level BPE with its merges."""

import json

from gguf import GGUFWriter, TokenType

from chatglm_tokenizer.model_file import read_model
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange.pieces import piece_names
from stage import UserError

# How a byte-level tokenizer.json cuts text before it merges -> llama.cpp's name of that cutting. None is GPT-2's, the
# default of tokenizers' ByteLevel (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp).
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTINGS = {
    None: "gpt-2",
    CONTRACTIONS + r"|\p{N}{1,3}" + REST: "llama-bpe",
    CONTRACTIONS + r"|\p{N}" + REST: "qwen2",
}


def write_vocabulary(writer: GGUFWriter, tokenizer, rows: int) -> None:
    """Write a vocabulary of either kind, with a name for each of the `rows` of the embedding."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        write_sentencepiece(writer, tokenizer, rows)
    else:
        write_byte_level(writer, tokenizer, rows)


def write_sentencepiece(writer: GGUFWriter, tokenizer: ChatGLMTokenizer, rows: int) -> None:
    """Pieces, scores and kinds, whose numbers are SentencePiece's own."""
    model = read_model(tokenizer.content)
    if not model.is_plain_bpe:
        raise UserError(
            f"词表 {tokenizer.vocab_file} 不是带字节回退的普通 BPE，llama.cpp 不会给出相同的 id；"
            "请用 train_tokenizer.py 训练的词表，或 --format pth。"
        )
    names = piece_names(tokenizer, model, rows)
    spare = rows - len(model.pieces)
    kinds = model.kinds + [TokenType.UNUSED] * spare
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(unreachable(names, kinds))
    writer.add_token_scores(model.scores + [-10_000.0] * spare)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.special_tokens["<bos>"])
    writer.add_eos_token_id(tokenizer.special_tokens["<eos>"])
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)  # <bos> stands between question and answer, not before the text
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def unreachable(names: list[str], kinds: list[int]) -> list[str]:
    """The names, with those changed that are no text but that llama.cpp would merge text into: `sop` is `so` + `p`.

    It looks a merged text up among all tokens, whatever their kind.
    """
    known, safe = set(names), []
    for name, kind in zip(names, kinds, strict=True):
        is_text = kind in (TokenType.NORMAL, TokenType.BYTE)
        cuts = ((name[:i], name[i:]) for i in range(1, len(name)))
        is_reached = not is_text and any(left in known and right in known for left, right in cuts)
        safe.append(f"<|{name}|>" if is_reached else name)
    return safe


def write_byte_level(writer: GGUFWriter, tokenizer, rows: int) -> None:
    """The tokens and merges of a byte-level BPE tokenizer.json, such as Llama 3's."""
    file = json.loads(tokenizer.files["tokenizer.json"])
    bpe, added = file["model"], {entry["id"]: entry for entry in file["added_tokens"]}
    vocab = {i: name for name, i in bpe["vocab"].items()} | {
        i: entry["content"] for i, entry in added.items()
    }
    kinds = [
        TokenType.UNUSED if i not in vocab
        else TokenType.NORMAL if i not in added
        else TokenType.CONTROL if added[i]["special"]
        else TokenType.USER_DEFINED
        for i in range(rows)
    ]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cutting(file, tokenizer))
    writer.add_token_list([vocab.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.special_tokens["<bos>"])
    writer.add_eos_token_id(tokenizer.special_tokens["<eos>"])
    writer.add_add_bos_token(False)  # the template has it


def cutting(file: dict, tokenizer) -> str:
    """llama.cpp's name of the rules by which a tokenizer.json cuts text; UserError if it has none."""
    pre = file.get("pre_tokenizer") or {}
    steps = {step["type"]: step for step in pre.get("pretokenizers", [pre] if pre else [])}
    level = steps.pop("ByteLevel", None)
    pattern = steps.pop("Split", {"pattern": {"Regex": None}})["pattern"].get("Regex", "")
    is_known = file["model"]["type"] == "BPE" and level and not steps and pattern in CUTTINGS
    if not is_known or level["use_regex"] != (pattern is None) or level.get("add_prefix_space"):
        raise UserError(
            "llama.cpp 没有这种 tokenizer.json 的切分规则（支持 GPT-2、Llama 3 与 Qwen2 的字节级 BPE），"
            "id 会不同，所以不写 GGUF；请用 --format hf，再用 llama.cpp 的 convert_hf_to_gguf.py 试试。"
        )
    return CUTTINGS[pattern]
