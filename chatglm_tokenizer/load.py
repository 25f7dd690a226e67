"""Any vocabulary from its path."""

from pathlib import Path

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.chat import CHAT_TEMPLATE
from chatglm_tokenizer.hf_tokenizer import HFTokenizer
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from stage import UserError


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary in a SentencePiece file, a tokenizer.json, or a folder with one of them."""
    path = Path(path)
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    if not path.is_dir():
        return ChatGLMTokenizer(path)
    has_model = (path / "tokenizer.model").is_file()
    if (path / "tokenizer.json").is_file():
        tokenizer = HFTokenizer(path)
        if not (has_model and tokenizer.chat_template == CHAT_TEMPLATE):
            return tokenizer  # else our own export: its ids are those of the SentencePiece model
    if has_model:
        return ChatGLMTokenizer(path / "tokenizer.model")
    raise UserError(f"{path} 里没有词表（tokenizer.json 或 tokenizer.model）；请用 --tokenizer 指定。")
