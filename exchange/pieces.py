"""What every file format has to say about a SentencePiece vocabulary: a name for each id."""

from chatglm_tokenizer.model_file import ModelFile
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2_SPECIALS, ChatGLMTokenizer


def piece_names(tokenizer: ChatGLMTokenizer, model: ModelFile, rows: int) -> list[str]:
    """The name of every id below `rows`: the pieces, ChatGLM2's specials, and `<unused_N>` for what is left."""
    names = list(model.pieces)
    if "sop" in tokenizer.special_tokens:
        names += CHATGLM2_SPECIALS
    return (names + [f"<unused_{i}>" for i in range(len(names), rows)])[:rows]
