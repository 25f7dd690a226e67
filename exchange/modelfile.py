"""ollama's Modelfile: the chat format as a Go template, and the settings that greedy answers need.

https://docs.ollama.com/modelfile. Without it ollama would answer with repeat_penalty 1.1 and temperature 0.8.
"""

from model import ModelArgs

BOS, EOS = "<s>", "</s>"  # SentencePiece's names, which GGUF keeps
# CHAT_TEMPLATE of chatglm_tokenizer/chat.py in Go's text/template. Spaces count: nothing may stand between the parts.
TEMPLATE = (
    "{{ if .System }}{{ .System }} {{ end }}"
    "{{ range .Messages }}"
    '{{ if eq .Role "user" }}{{ .Content }}'
    + BOS
    + '{{ else if eq .Role "assistant" }}{{ .Content }}'
    + EOS
    + "{{ end }}"
    "{{ end }}"
)


def modelfile(weights: str, args: ModelArgs, is_our_format: bool) -> str:
    """The text of a Modelfile.

    weights: name of the GGUF file beside it. is_our_format: False leaves the template and the stop texts to ollama,
    which knows those of the usual models.
    """
    ours = [f'TEMPLATE """{TEMPLATE}"""', f'PARAMETER stop "{EOS}"'] if is_our_format else []
    lines = [
        f"FROM ./{weights}",
        *ours,
        f"PARAMETER num_ctx {args.max_seq_len}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
    ]
    return "\n".join(lines) + "\n"
