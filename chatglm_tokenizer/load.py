"""Any vocabulary from its path."""

from pathlib import Path

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.chat import CHAT_TEMPLATE
from chatglm_tokenizer.hf_tokenizer import HFTokenizer, read_chat_template, read_settings
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from stage import UserError


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary in a SentencePiece file, a tokenizer.json, or a folder with one of them."""
    path = Path(path)
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    if not path.is_dir():
        return ChatGLMTokenizer(path)
    json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
    if not json_file.is_file() and not model_file.is_file():
        raise UserError(f"{path} 里没有词表（tokenizer.json 或 tokenizer.model）；请用 --tokenizer 指定。")
    template = read_chat_template(path, read_settings(path))
    if model_file.is_file() and (template == CHAT_TEMPLATE or not (template or json_file.is_file())):
        return ChatGLMTokenizer(
            model_file
        )  # also of our own exports, whose tokenizer.json gives the same ids
    if json_file.is_file():
        return HFTokenizer(path, json_file.read_bytes())
    # A chat template writes control tokens by name, which SentencePiece does not know.
    from exchange.hf_tokenizer_file import from_model_file

    return HFTokenizer(path, from_model_file(path, ChatGLMTokenizer(model_file)).to_str().encode())
