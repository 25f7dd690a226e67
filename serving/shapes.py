"""From the engine's pieces to OpenAI's answers, whole or as server-sent events."""

import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

from generation.engine import Piece
from generation.sampling import Logprob
from serving.errors import ApiError
from serving.reader import Reader
from serving.responses import (
    Alternative,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Message,
    TokenLogprob,
    Usage,
)


class Shape:
    """How the answers to one request look. `prefixes`: what precedes each answer's text (echo)."""

    def __init__(
        self, kind: str, service: Any, reader: Reader, n: int, prefixes: list[str] | None, top: int | None
    ):
        self.kind, self.service, self.reader, self.n, self.top = kind, service, reader, n, top
        self.is_chat = kind == "chatcmpl"
        self.started = time.monotonic()
        self.has_first = False
        self.texts = list(prefixes or [""] * len(reader.answers))
        self.prefixes = list(self.texts)
        self.logprobs: list[list[tuple[Logprob, int]]] = [[] for _ in reader.answers]
        self.envelope = dict(
            id=f"{kind}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=service.name,
            system_fingerprint=service.fingerprint,
        )

    def take(self, index: int, piece: Piece) -> tuple[str, list[tuple[Logprob, int]]]:
        """Note a piece; its text, and its tokens' log-probabilities with the place of each in the text."""
        if not self.has_first:
            self.has_first = True
            self.service.metrics.first_token_seconds.observe(time.monotonic() - self.started)
        text, before = piece.text, len(self.prefixes[index])
        if self.is_chat and not self.texts[index]:
            text = text.lstrip()  # the first piece of a vocabulary like Llama's has a space before its word
        logprobs = [
            (entry, before + begin) for entry, begin in zip(piece.logprobs or (), piece.begins, strict=False)
        ]
        self.texts[index] += text
        self.logprobs[index] += logprobs
        return text, logprobs

    def usage(self) -> Usage:
        """Tokens of the prompts, each counted once, and of all answers."""
        answers = self.reader.answers
        prompt = sum(answer.prompt_tokens for answer in answers[:: self.n])
        completion = sum(answer.completion_tokens for answer in answers)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def told(self, logprobs: list[tuple[Logprob, int]]) -> ChatLogprobs | CompletionLogprobs | None:
        """Log-probabilities in the shape of this API; None if they were not asked for."""
        if self.top is None:
            return None
        name = self.service.token_text
        if self.is_chat:
            return ChatLogprobs(
                content=[
                    TokenLogprob(
                        **alternative(name, entry.id, entry.logprob),
                        top_logprobs=[Alternative(**alternative(name, i, p)) for i, p in entry.top],
                    )
                    for entry, _ in logprobs
                ]
            )
        return CompletionLogprobs(
            tokens=[name(entry.id)[0] for entry, _ in logprobs],
            token_logprobs=[finite(entry.logprob) for entry, _ in logprobs],
            top_logprobs=[{name(i)[0]: finite(p) for i, p in entry.top} for entry, _ in logprobs]
            if self.top
            else None,
            text_offset=[place for _, place in logprobs],
        )

    async def whole(self) -> ChatCompletion | Completion:
        """The answer when all of it is there."""
        async for item in self.reader:
            if item and item[1]:
                self.take(*item)
        reasons = [self.reader.finish_reason(i) for i in range(len(self.texts))]
        rows = zip(range(len(self.texts)), self.texts, map(self.told, self.logprobs), reasons, strict=True)
        if self.is_chat:
            choices = [
                ChatChoice(index=i, message=Message(content=text), logprobs=p, finish_reason=reason)
                for i, text, p, reason in rows
            ]
            return ChatCompletion(**self.envelope, choices=choices, usage=self.usage())
        choices = [
            CompletionChoice(index=i, text=text, logprobs=p, finish_reason=reason)
            for i, text, p, reason in rows
        ]
        return Completion(**self.envelope, choices=choices, usage=self.usage())

    def chunk(
        self,
        index: int,
        text: str | None,
        logprobs: list | None = None,
        reason: str | None = None,
        **delta: Any,
    ) -> bytes:
        """One event; with text None, one that only says something else."""
        told = self.told(logprobs) if logprobs else None
        if self.is_chat:
            new = Delta(content=text, **delta).model_dump(exclude_none=True)
            choice = ChatChunkChoice(index=index, delta=Delta(), logprobs=told, finish_reason=reason)
            body = ChatChunk(**self.envelope, choices=[choice]).model_dump()
            body["choices"][0]["delta"] = new
        else:
            choice = CompletionChoice(index=index, text=text or "", logprobs=told, finish_reason=reason)
            body = Completion(**self.envelope, choices=[choice]).model_dump()
        return event(body)

    async def events(self, wants_usage: bool) -> AsyncIterator[bytes]:
        """The answer as it comes: server-sent events, the last of them [DONE]."""
        for index in range(len(self.texts)):
            if self.is_chat:
                yield self.chunk(index, "", role="assistant")
            elif self.prefixes[index]:
                yield self.chunk(index, self.prefixes[index])
        try:
            async for item in self.reader:
                if item is None:
                    yield b": waiting\n\n"
                    continue
                index, piece = item
                if piece is None:
                    yield self.chunk(index, None, reason=self.reader.finish_reason(index))
                    continue
                text, logprobs = self.take(index, piece)
                if text or logprobs:
                    yield self.chunk(index, text, logprobs)
        except ApiError as error:  # the status has been sent long ago
            yield event(error.body.model_dump())
        else:
            if wants_usage:
                body = ChatChunk if self.is_chat else Completion
                yield event(body(**self.envelope, choices=[], usage=self.usage()).model_dump())
        yield b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def alternative(
    name: Callable[[int], tuple[str, list[int] | None]], token: int, logprob: float
) -> dict[str, Any]:
    text, content = name(token)
    return dict(token=text, logprob=finite(logprob), bytes=content)


def finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI writes -9999 instead."""
    return max(logprob, -9999.0)
