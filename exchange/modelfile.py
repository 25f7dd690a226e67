"""ollama's Modelfile: the chat format as a Go template, and the settings that greedy answers need.

https://docs.ollama.com/modelfile. Without it ollama would answer with repeat_penalty 1.1 and temperature 0.8.
"""

from collections.abc import Mapping

from model import ModelArgs

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}  # SentencePiece's, which GGUF keeps
# CHAT_TEMPLATE (chatglm_tokenizer/chat_template.py) in Go's text/template. Spaces count: nothing stands between
# the parts.
TEMPLATE = (
    "{{ if .System }}{{ .System }} {{ end }}"
    "{{ range .Messages }}"
    '{{ if eq .Role "user" }}{{ .Content }}bos_token{{ else if eq .Role "assistant" }}{{ .Content }}eos_token{{ end }}'
    "{{ end }}"
)


def modelfile(weights: str, args: ModelArgs, is_our_format: bool, names: Mapping[str, str]) -> str:
    """The text of a Modelfile.

    weights: name of the GGUF file beside it. is_our_format: False leaves the template and the stop texts to ollama,
    which knows those of the usual models. names: of control tokens, if they are not SentencePiece's.
    """
    names, template, ours = {**NAMES, **names}, TEMPLATE, []
    for name in NAMES:
        template = template.replace(name, names[name])
    if is_our_format:
        ours = [f'TEMPLATE """{template}"""', f'PARAMETER stop "{names["eos_token"]}"']
    lines = [
        f"FROM ./{weights}",
        *ours,
        f"PARAMETER num_ctx {args.max_seq_len}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
    ]
    return "\n".join(lines) + "\n"
