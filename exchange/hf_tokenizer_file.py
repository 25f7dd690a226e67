"""Our vocabulary as a Hugging Face fast tokenizer: tokenizer.json and tokenizer_config.json, read without own code.

A SentencePiece BPE model says how good each piece is, a tokenizer.json which pairs merge in which order. Both give
the same ids when every way of splitting a piece in two is a merge, the best pieces first.

Special tokens: only `<unk>`, `<s>` and `</s>` are matched in text. ChatGLM2's `[gMASK]`, `sop` ... have their ids, but
no merge leads to them: matched, "sop" would tear "Philosophy" apart.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from chatglm_tokenizer.hf_tokenizer import read_json, read_settings
from chatglm_tokenizer.model_file import NORMAL, ModelFile, read_model
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange.pieces import piece_names
from sources.report import write_json
from stage import UserError

SPACE = "▁"  # how SentencePiece writes a space


def write_tokenizer(folder: Path, tokenizer: ChatGLMTokenizer, rows: int, length: int, template: str) -> None:
    """Write the tokenizer files of a Hugging Face folder.

    rows: of the model's embedding; no id lies beyond them. length: tokens that the model can take.
    template: the chat format in Jinja. UserError for a vocabulary that merges alone do not describe.
    """
    fast_tokenizer(tokenizer, rows).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings(tokenizer, length, template))
    # For llama.cpp's own converter and for sft.py --init, which read SentencePiece's file.
    (folder / "tokenizer.model").write_bytes(tokenizer.content)


def from_model_file(folder: Path, tokenizer: ChatGLMTokenizer) -> Tokenizer:
    """The tokenizer of a Hugging Face folder without tokenizer.json, as transformers makes it of tokenizer.model.

    With the tokens that the folder adds to it; with `"legacy": false` only the beginning of a text gets a space
    before it, not what follows a control token.
    """
    settings = read_settings(folder)
    fast = fast_tokenizer(tokenizer, tokenizer.vocab_size)
    if settings.get("legacy") is False:
        fast.normalizer = None
        fast.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    for i, token in added_tokens(folder, settings):
        if i != fast.token_to_id(token.content) and i != fast.get_vocab_size():
            raise UserError(f"{folder} 把 {token.content} 编为 {i}，与 tokenizer.model 的条目接不上。")
        if token.content not in known:
            (fast.add_special_tokens if token.special else fast.add_tokens)([token])
    return fast


def added_tokens(folder: Path, settings: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """The tokens that a folder adds to its vocabulary, by id: tokenizer_config.json's, and the older file's."""
    named = [value for name, value in settings.items() if name.endswith("_token")]
    named += settings.get("additional_special_tokens") or []
    special = {value.get("content") if isinstance(value, dict) else value for value in named if value}
    found = {
        i: {"content": name, "special": name in special, "normalized": name not in special}
        for name, i in read_json(folder / "added_tokens.json").items()
    }
    found |= {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return [
        (i, AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token}))
        for i, token in sorted(found.items())
    ]


def fast_tokenizer(tokenizer: ChatGLMTokenizer, rows: int) -> Tokenizer:
    """The same vocabulary in Hugging Face's form: equal ids for every text without the special tokens' names."""
    model = read_model(tokenizer.content)
    if not model.is_plain_bpe:
        raise UserError(
            f"词表 {tokenizer.vocab_file} 不是带字节回退的普通 BPE（可能是 unigram，或会改写文本），"
            "无法逐个 id 相同地写成 tokenizer.json；请用 train_tokenizer.py 训练的词表，或 --format pth。"
        )
    warn_of_ties(tokenizer, model)
    vocab = {piece: i for i, piece in enumerate(piece_names(tokenizer, model, rows))}
    unknown, bos, eos = model.pieces[:3]
    fast = Tokenizer(
        BPE(vocab=vocab, merges=merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in (unknown, bos, eos)]
    )
    return fast


def warn_of_ties(tokenizer: ChatGLMTokenizer, model: ModelFile) -> None:
    """Say so if pieces have equal scores: SentencePiece then merges from left to right, a list of merges cannot."""
    triples = zip(model.pieces, model.scores, model.kinds, strict=True)
    scores = [score for piece, score, kind in triples if kind == NORMAL and len(piece) > 1]
    if ties := len(scores) - len(set(scores)):
        print(
            f"提示：词表 {tokenizer.vocab_file} 有 {ties + 1:,} 个条目的分数相同（如 Chinese-LLaMA 的词表），"
            "tokenizer.json 写不出它们的先后：在 transformers 里有些文本的 id 会与这里不同；GGUF 没有这个问题。",
            flush=True,
        )


def merges(model: ModelFile) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces; those of the best piece first."""
    ids = {piece: i for i, piece in enumerate(model.pieces) if model.kinds[i] == NORMAL}
    found = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-model.scores[i], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def settings(tokenizer: ChatGLMTokenizer, length: int, template: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    unknown, bos, eos = (tokenizer.sp.id_to_piece(i) for i in range(3))
    return {
        # Not LlamaTokenizer: transformers 5 would build another normaliser than tokenizer.json's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": unknown,  # SentencePiece's 0, as in training
        # llama.cpp's converter would have <s> before every text without these.
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
        "padding_side": "left",
        "chat_template": template,
    }
