"""Chat templates of Hugging Face models: Jinja, rendered as transformers does, in a sandbox.

https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# "Today" in training: the text of a run must not change at midnight. It is the date that Llama 3's own template takes
# where it knows none.
TRAINING_DAY = datetime(2024, 7, 26)

# The format of chat.py as Jinja, for other programs (https://huggingface.co/docs/transformers/chat_templating), and
# for imported vocabularies whose model has no format of its own. Rendered and tokenised as one string it gives the
# ids of `encode_prompt`. Each text is encoded by itself there, so it begins with the space that SentencePiece puts
# before a text. Here the tokenizer puts it behind control tokens; between the system text and the question, where
# there is none, the template does.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] | trim -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = '' -%}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{{- system -}}"
    "{%- for message in turns -%}"
    "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{- raise_exception('roles must alternate user, assistant') -}}"
    "{%- endif -%}"
    "{%- if loop.first and system and message['content'] -%}{{- ' ' -}}{%- endif -%}"
    "{{- message['content'] -}}"
    "{{- bos_token if message['role'] == 'user' else eos_token -}}"
    "{%- endfor -%}"
)


class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`, which marks an answer in a template: here it is only its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[dict[str, str]],
    names: dict[str, str],
    answer_follows: bool,
    day: datetime | None = None,
) -> str:
    """The dialogue as the template writes it. ValueError for one that it refuses.

    names: the tokenizer's special tokens, such as `bos_token`. answer_follows: with the beginning of an answer
    (`add_generation_prompt`). day: what `strftime_now` takes for now.
    """
    try:
        return compile_template(template).render(
            messages=list(messages),
            add_generation_prompt=answer_follows,
            tools=None,
            documents=None,
            strftime_now=(day or datetime.now()).strftime,
            **names,
        )
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from error
    except (TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=8)
def compile_template(template: str) -> Template:
    """The template, compiled; jinja2.TemplateError if it is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without the escapes that Jinja's own filter makes for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def refuse(message: str) -> NoReturn:
    """What a template calls for a dialogue that it cannot write."""
    raise TemplateError(message)
