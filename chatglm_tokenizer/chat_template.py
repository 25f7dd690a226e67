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
