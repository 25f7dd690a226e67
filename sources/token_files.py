"""Token files: flat ids without a header, `<eos>` after every document, a JSON sidecar beside them."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from chatglm_tokenizer.batch_encoder import token_dtype
from stage import atomic_path, remove, sidecar_path

if TYPE_CHECKING:
    from chatglm_tokenizer.base import Tokenizer

COUNTED = ("documents", "tokens", "characters", "bytes")


class TokenFile:
    """A token file while it is being written, and the counts for its sidecar."""

    def __init__(self, path: Path, handle: BinaryIO, tokenizer: "Tokenizer", names: Sequence[str]) -> None:
        """names: of the sources, as the entries of documents number them."""
        self.path, self.handle, self.tokenizer, self.names = path, handle, tokenizer, list(names)
        self.dtype = token_dtype(tokenizer)
        self.counts = np.zeros((len(self.names), len(COUNTED)), np.int64)

    def write(self, entries: np.ndarray, ids: np.ndarray) -> None:
        """Append documents, (n,) token_runs.ENTRY, and their ids, one behind the other."""
        self.handle.write(np.ascontiguousarray(ids, self.dtype).data)
        np.add.at(self.counts[:, 0], entries["source"], 1)
        for column, name in enumerate(COUNTED[1:], 1):
            np.add.at(self.counts[:, column], entries["source"], entries[name])

    def total(self, name: str) -> int:
        """Documents, tokens, characters or bytes of all sources."""
        return int(self.counts[:, COUNTED.index(name)].sum())

    def sources(self) -> dict[str, dict[str, int]]:
        """Documents, tokens and so on by source, for those that are in the file."""
        return {
            name: dict(zip(COUNTED, row, strict=True))
            for name, row in zip(self.names, self.counts.tolist(), strict=True)
            if row[0]
        }

    def sidecar(self) -> dict[str, Any]:
        """What the JSON beside the file says; characters and bytes are those of `text_tokens` of the tokens."""
        return {
            "dtype": self.dtype.name,
            **{name: self.total(name) for name in ("tokens", "documents", "characters", "bytes")},
            "text_tokens": self.total("tokens"),
            "tokenizer": {
                "path": str(self.tokenizer.vocab_file.resolve()),
                "sha256": self.tokenizer.sha256,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "sources": self.sources(),
        }


@contextmanager
def open_token_files(
    paths: Sequence[Path], tokenizer: "Tokenizer", names: Sequence[str], more: dict[str, Any]
) -> Iterator[list[TokenFile]]:
    """Write token files that appear under their names, with their sidecars, only when all went well.

    more: put into every sidecar, read when the files are complete. A sidecar appears before its file: whatever
    happens between the two, no file is there without one, and one that does not fit is found by its size.
    """
    for path in paths:
        for name in (path.name, sidecar_path(path).name):
            for leftover in path.parent.glob(f".{escape(name)}.tmp-*"):  # of a run that was killed
                remove(leftover)
    with ExitStack() as stack:
        files, sidecars = [], []
        for path in paths:
            temporary = stack.enter_context(atomic_path(path))
            sidecars.append(stack.enter_context(atomic_path(sidecar_path(path))))
            handle = stack.enter_context(open(temporary, "wb"))
            files.append(TokenFile(path, handle, tokenizer, names))
        yield files
        for file, sidecar in zip(files, sidecars, strict=True):
            file.handle.flush()
            os.fsync(file.handle.fileno())  # a full disk is noticed before anything appears
            content = json.dumps({**file.sidecar(), **more}, ensure_ascii=False, indent=2)
            sidecar.write_text(content + "\n", encoding="utf-8")
