"""The bodies of requests, as OpenAI documents them (https://platform.openai.com/docs/api-reference/chat/create).

Types are strict: "0.5" is no number and 1 no boolean. What would change the answer and is not supported is refused
by name, unless its value means what happens anyway; a name that is not known at all is refused as a misspelling.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.errors import ApiError

# Parameters that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
}
# Parameters for the books of a provider; they never change an answer.
IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "tool_calls": (None, []),
    "tool_call_id": (None,),
    "function_call": (None,),
    "audio": (None,),
    "refusal": (None, ""),
    "annotations": (None, []),
}

Text = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def without(data: Any, unsupported: dict[str, tuple[Any, ...]], ignored: set[str]) -> Any:
    """A body less what has no effect; ApiError for what is not supported."""
    if not isinstance(data, dict):
        return data
    for name, neutral in unsupported.items():
        if name in data and data[name] not in neutral:
            raise ApiError(400, f"不支持参数 {name}", "unsupported_parameter", name)
    return {name: value for name, value in data.items() if name not in ignored | unsupported.keys()}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, data: Any) -> Any:
        return without(data, UNSUPPORTED_IN_MESSAGES, {"name"})

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = (
        None  # nothing here is padded; accepted as it is a default of some clients
    )


class Request(Strict):
    """What both ways of asking have in common. What is left out is as the server was started."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # not OpenAI's; the names are those of vLLM and llama.cpp
    top_k: Annotated[int, Field(ge=-1, description="-1 或 0：不限")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, data: Any) -> Any:
        return without(data, UNSUPPORTED, IGNORED)

    @model_validator(mode="after")
    def check_stream_options(self) -> "Request":
        if self.stream_options and not self.stream:
            raise ApiError(
                400, "stream_options 只能与 stream: true 一起用", "invalid_value", "stream_options"
            )
        return self

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def stops(self) -> tuple[str, ...] | None:
        return (self.stop,) if isinstance(self.stop, str) else None if self.stop is None else tuple(self.stop)


Item = TypeVar("Item")
# A list that is wrong is refused at its first wrong item: a million complaints would take seconds.
Several = Annotated[list[Item], Field(min_length=1, fail_fast=True)]


class ChatRequest(Request):
    messages: Several[ChatMessage]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs 只能与 logprobs: true 一起用", "invalid_value", "top_logprobs")
        return self

    def limit(self) -> int | None:
        """The most tokens that an answer may have, if the request says."""
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        """How many alternatives of each token are asked for; 0: the token alone."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    prompt: str | Several[str] | Several[TokenId] | Several[Several[TokenId]]
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @model_validator(mode="after")
    def check_combinations(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of 只支持与 n 相同", "unsupported_parameter", "best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400, "不支持提示词本身的概率：echo 与 logprobs 不能同用", "unsupported_parameter", "echo"
            )
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, of which a request may have several."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt

    def limit(self) -> int | None:
        return self.max_tokens

    def alternatives(self) -> int | None:
        return self.logprobs


NAMES = {
    name
    for model in (ChatRequest, CompletionRequest, ChatMessage, TextPart, StreamOptions)
    for name in model.model_fields
}
