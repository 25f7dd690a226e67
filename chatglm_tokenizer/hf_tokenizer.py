"""The vocabulary of a Hugging Face folder (tokenizer.json), with the interface of ChatGLMTokenizer.

The `tokenizers` library encodes, so that plain text gets the ids that transformers gives it. It would take the name
of a control token in a text for the token itself; here such a name is broken by a mark, a character that the text
does not have, and the ids of the marks are left out again. So only what a chat template writes becomes a control
token, never what a user does.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_tokenizer.base import NotText, Tokenizer, check_surrogates
from chatglm_tokenizer.chat_template import CHAT_TEMPLATE
from stage import UserError

MARKS = tuple(map(chr, range(0xE000, 0xF900)))  # characters without a meaning (Unicode's private use area)


class HFTokenizer(Tokenizer):
    """Text <-> ids over a tokenizer.json and what lies beside it."""

    def __init__(self, folder: Path, content: bytes):
        """content: of the tokenizer.json. UserError if it is unusable, or nothing says which token ends a text."""
        self.vocab_file = folder
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.tokenizer = read_tokenizer(folder, content)
        self.settings = read_settings(folder)
        self.chat_template = read_chat_template(folder, self.settings)
        added = self.tokenizer.get_added_tokens_decoder()
        self.names = {i: token.content for i, token in added.items() if token.special}  # control tokens
        self.added = {i: token.content for i, token in added.items() if not token.special}
        longest_first = sorted(filter(None, self.names.values()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        ids = self.ids_of_config(folder)
        if not ids["eos"]:
            raise UserError(f"{folder} 没有说明结束符；请在它的 tokenizer_config.json 里写上 eos_token。")
        self.stop_ids = ids["eos"]
        # A vocabulary without a token of its own for the beginning separates with the one it has.
        self.special_tokens = {"<bos>": (ids["bos"] or ids["eos"])[0], "<eos>": ids["eos"][0]}
        self._content = content
        if not self.chat_template and set(self.special_tokens.values()) <= self.names.keys():
            # Our own format, written as every template is: so an export says what the model was trained with.
            self.chat_template = CHAT_TEMPLATE
            begin, end = (self.names[i] for i in self.special_tokens.values())
            self.settings |= {"bos_token": begin, "eos_token": end}

    def ids_of_config(self, folder: Path) -> dict[str, list[int]]:
        """Ids that begin and that end a text, the tokenizer's own first, then what the model's files add."""
        model, generation = (read_json(folder / name) for name in ("config.json", "generation_config.json"))
        found: dict[str, list[int]] = {}
        for kind in ("bos", "eos"):
            own = self.tokenizer.token_to_id(self.settings.get(f"{kind}_token") or "")
            ids = [own]
            for values in (generation.get(f"{kind}_token_id"), model.get(f"{kind}_token_id")):
                ids += values if isinstance(values, list) else [values]
            known = (i for i in ids if isinstance(i, int) and 0 <= i < self.vocab_size)
            found[kind] = list(dict.fromkeys(known))
        return found

    @cached_property
    def vocab_size(self) -> int:
        """Rows that a model's embedding needs: up to the highest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def least_rows(self) -> int:
        """Rows without which a model cannot be used: some folders name a padding token that the model lacks."""
        template = self.chat_template or ""
        written = [i for i, name in self.names.items() if name in template]
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False).values()
        return 1 + max([*vocabulary, *self.added, *written, *self.special_tokens.values()])

    @property
    def template_names(self) -> dict[str, str]:
        """Control tokens that a chat template may write by a name such as `bos_token`."""
        return {k: v for k, v in self.settings.items() if k.endswith("_token") and isinstance(v, str)}

    @property
    def files(self) -> dict[str, bytes]:
        """What a checkpoint keeps of this vocabulary; the model's own files, which it lacks, named the ids as well."""
        ids = {"bos_token_id": self.special_tokens["<bos>"], "eos_token_id": self.stop_ids}
        # transformers 5 builds a LlamaTokenizer's rules anew; by this name it takes those of the file, as 4 does.
        settings = {**self.settings, "tokenizer_class": "PreTrainedTokenizerFast"}
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        texts = {"tokenizer_config.json": settings, "generation_config.json": ids}
        kept = {name: json.dumps(value, ensure_ascii=False, indent=2) for name, value in texts.items()}
        return {"tokenizer.json": self._content} | {name: text.encode() for name, text in kept.items()}

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of many texts, (n,) int32 each. The library uses all cores unless TOKENIZERS_PARALLELISM is false."""
        texts = list(texts)
        try:
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                check_surrogates(text)
            raise
        rows = [encoding.ids for encoding in found]
        for number, text in enumerate(texts):
            if self.control.search(text):
                rows[number] = self.encode_marked(*self.broken([text]))[0]
            if not self.names.keys().isdisjoint(rows[number]):
                raise NotText(f"a name of a control token cannot be encoded as text: {text[:40]!r}")
        return [np.array(row, np.int32) for row in rows]

    def broken(self, texts: Sequence[str]) -> tuple[list[str], str]:
        """The texts with every name of a control token broken by a mark, and the mark.

        NotText where a name cannot be broken: one of a single character, or one that has another at its end.
        """
        joined = "".join(texts)
        mark = next(character for character in MARKS if character not in joined)
        found = [self.control.sub(lambda m: m[0][:1] + mark + m[0][1:], text) for text in texts]
        for text, marked in zip(texts, found, strict=True):
            if self.control.search(marked):
                raise NotText(f"a name of a control token cannot be encoded as text: {text[:40]!r}")
        return found, mark

    def encode_marked(self, texts: Sequence[str], mark: str) -> list[list[int]]:
        """Ids of texts in which names of control tokens stand for the tokens, without those of the marks."""
        rows = []
        for text in texts:
            check_surrogates(text)
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            ids = encoding.ids
            if mark in text:
                offsets = encoding.offsets
                marked = [mark in text[start:end] for start, end in offsets]
                if any(m and end - start > 1 for m, (start, end) in zip(marked, offsets, strict=True)):
                    raise NotText(f"a name of a control token cannot be encoded as text: {text[:40]!r}")
                ids = [i for i, is_mark in zip(ids, marked, strict=True) if not is_mark]
            rows.append(ids)
        return rows

    def decode(self, ids: int | Sequence[int]) -> str:
        """Text of ids; control tokens give nothing. Raises ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ([ids] if isinstance(ids, int) else ids)]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size} ids")
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (vocab_size,) int64; none of a control token."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        decoder = self.tokenizer.decoder
        byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        for piece, i in self.tokenizer.get_vocab(with_added_tokens=False).items():
            if byte_level:  # a character stands for a byte
                sizes[i] = len(piece)
            else:
                is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
                sizes[i] = 1 if is_byte else len(piece.replace("▁", " ").encode())
        for i, name in self.added.items():
            sizes[i] = len(name.encode())
        sizes[list(self.names)] = 0
        return sizes


def read_tokenizer(folder: Path, content: bytes) -> Any:
    """The library's tokenizer; UserError for a file that it cannot read."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise UserError(f"{folder} 的词表需要 tokenizers：pip install tokenizers") from error
    try:
        tokenizer = Library.from_str(content.decode())
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{folder / 'tokenizer.json'} 已损坏或不是分词器文件：{error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the names of special tokens as plain strings, and those of the older file."""
    settings = {
        **read_json(folder / "special_tokens_map.json"),
        **read_json(folder / "tokenizer_config.json"),
    }
    return {
        name: value.get("content") if name.endswith("_token") and isinstance(value, dict) else value
        for name, value in settings.items()
    }


def read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template of a folder, wherever a version of transformers has put it; of several, the default one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, UserError if it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} 不是 JSON：{error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} 应是一个 JSON 对象。")
    return content
