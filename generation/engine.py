"""A thread that decodes all running requests together, and the answers it streams.

engine = Engine(model, tokenizer)
answer = engine.submit(prompt_ids, Sampling(max_new_tokens=100))
for piece in answer:
    print(piece.text, end="")
print(answer.finish_reason)
"""

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from chatglm_tokenizer.base import Tokenizer
from generation.batch import Batch, Row
from generation.sampling import Logprob, Sampling
from generation.text import StopStrings, TextStream
from model import Transformer


class Busy(Exception):
    """As many requests are waiting as may."""


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, the ids that it came with, and what was asked to know of each of them.

    begins: where in the answer the text of each id begins, in characters.
    """

    text: str
    ids: list[int]
    begins: list[int]
    logprobs: list[Logprob] | None = None


Notify = Callable[[Piece | None], object]  # takes pieces in the engine's thread, and None behind the last


class Answer:
    """What the engine generates for one request: iterate over it for its pieces, then read `finish_reason`.

    With a `notify` the pieces go there instead, as they come, and there is nothing to iterate over.
    finish_reason: "stop" (a stop id or string), "length" (max_new_tokens, or the context is full), "cancelled", or
    "error", with a message in `error`. completion_tokens counts every generated id, the stop id included.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, notify: Notify | None = None):
        self.prompt, self.sampling = list(prompt), sampling
        self.prompt_tokens, self.completion_tokens = len(self.prompt), 0
        self.finish_reason: str | None = None
        self.error = ""
        self.is_cancelled = False
        self._pieces: queue.Queue[Piece | None] = queue.Queue()
        self.put = notify or self._pieces.put
        self._ended = False  # the reader has seen the end

    def get(self, timeout: float | None = None) -> Piece | None:
        """The next piece, waiting for it; None behind the last. queue.Empty after `timeout` seconds."""
        if self._ended:
            return None
        piece = self._pieces.get(timeout=timeout)
        self._ended = piece is None
        return piece

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self.get()) is not None:
            yield piece

    def text(self) -> str:
        """All of the text that is still to come, when it is all there. RuntimeError if the engine met an error."""
        text = "".join(piece.text for piece in self)
        if self.finish_reason == "error":
            raise RuntimeError(self.error)
        return text

    def cancel(self) -> None:
        """Give up: the answer ends within a step, and its slot is free."""
        self.is_cancelled = True


class Running:
    """A request in the batch: from its ids to the pieces of its answer."""

    def __init__(self, answer: Answer, row: Row, tokenizer: Tokenizer):
        self.answer, self.row = answer, row
        self.stream = TextStream(tokenizer, before(tokenizer, answer.prompt))
        self.stop = StopStrings(answer.sampling.stop)
        self.taken = 0  # ids of the row that have been looked at
        self.length = 0  # characters that they gave
        self.pending: list[tuple[int, int]] = []  # (index of an id, where its text begins) not yet in a piece

    def advance(self, stop_ids: frozenset[int]) -> None:
        """Turn the row's new ids into text, and put what is certain into the answer."""
        for index in range(self.taken, len(self.row.ids)):
            self.answer.completion_tokens += 1
            if self.row.ids[index] in stop_ids:
                break
            self.pending.append((index, self.length))
            text = self.stream.push(self.row.ids[index])
            self.length += len(text)
            self.put(self.stop.push(text))
            if self.stop.found:
                self.row.finish_reason = "stop"
                break
        self.taken = len(self.row.ids)
        if self.row.finish_reason and not self.stop.found:
            text = self.stream.finish()
            self.length += len(text)
            self.put(self.stop.push(text) + self.stop.finish(), last=True)
            if self.stop.found:
                self.row.finish_reason = "stop"

    def put(self, text: str, last: bool = False) -> None:
        """Send text with the ids it is made of; those of a stop string are sent with nothing."""
        if self.stop.found:  # an id all of whose text is behind the end belongs to no piece
            end = self.length - len(self.stop.held)
            self.pending = [(index, begin) for index, begin in self.pending if begin < end]
        if not text and not (last and self.pending):
            return
        places, begins = [index for index, _ in self.pending], [begin for _, begin in self.pending]
        self.pending = []
        asked = self.answer.sampling.logprobs is not None
        self.answer.put(
            Piece(
                text,
                [self.row.ids[i] for i in places],
                begins,
                [self.row.logprobs[i] for i in places] if asked else None,
            )
        )


def before(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """What of a prompt decides how the answer's text begins: its last id, unless that is half a character.

    SentencePiece drops the space before a text's first word. After `<bos>`, which has no text, that is wanted.
    """
    last = list(prompt[-1:])
    return [] if tokenizer.decode(last).endswith("\ufffd") else last


class Engine:
    """Decodes up to `slots` requests at a time; up to `max_waiting` more wait for a slot, in order."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, slots: int = 16, max_waiting: int = 64):
        self.tokenizer, self.max_waiting = tokenizer, max_waiting
        self.batch = Batch(model.eval(), slots, tokenizer.stop_ids, tokenizer.vocab_size)
        self.waiting: deque[Answer] = deque()
        self.running: list[Running] = []
        self.counts = dict.fromkeys(
            ("requests", "prompt_tokens", "generated_tokens", "cancelled", "errors", "steps"), 0
        )
        self.busy_seconds = 0.0
        self.changed = threading.Condition(threading.RLock())  # guards waiting, counts and is_closing
        self.is_closing = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, prompt: Sequence[int], sampling: Sampling, notify: Notify | None = None) -> Answer:
        """Queue a request. Busy when too many wait; ValueError for an unusable prompt; RuntimeError once closed.

        notify: where the pieces go, for those who cannot wait for them; it must neither block nor raise.
        """
        self.batch.check(prompt)
        answer = Answer(prompt, sampling, notify)
        with self.changed:
            if self.is_closing:
                raise RuntimeError("the engine is closed")
            if len(self.waiting) + len(self.running) >= self.batch.slots + self.max_waiting:
                raise Busy(f"{len(self.waiting)} requests are waiting")
            self.waiting.append(answer)
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += answer.prompt_tokens
            self.changed.notify()
        return answer

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(0 if any(error) else None)

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, let those that are there finish, and stop; after `timeout` seconds cancel them."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join(timeout)
        if self.thread.is_alive():
            with self.changed:
                for answer in (*self.waiting, *(r.answer for r in self.running)):
                    answer.cancel()
            self.thread.join(timeout)

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what there is now."""
        with self.changed:
            return {
                **self.counts,
                "running": len(self.running),
                "waiting": len(self.waiting),
                "slots": self.batch.slots,
                "max_waiting": self.max_waiting,
                "cache_bytes": self.batch.cache.nbytes(),
                "busy_seconds": self.busy_seconds,
            }

    def _run(self) -> None:
        while self._admit():
            start = time.perf_counter()
            try:
                self._step()
            except Exception as error:  # the requests end; the engine goes on
                traceback.print_exc()
                self._fail(f"{type(error).__name__}: {error}")
            self.busy_seconds += time.perf_counter() - start

    def _admit(self) -> bool:
        """Give waiting requests the free slots; sleep while there is nothing to do. False: closed, and all is done."""
        with self.changed:
            while not self.waiting and not self.running:
                if self.is_closing:
                    return False
                self.changed.wait()
            for answer in [a for a in self.waiting if a.is_cancelled]:
                self.waiting.remove(answer)
                self._end(answer, "cancelled")
            while self.waiting and len(self.running) < self.batch.slots:
                answer = self.waiting.popleft()
                row = self.batch.add(answer.prompt, answer.sampling)
                try:
                    self.running.append(Running(answer, row, self.tokenizer))
                except Exception as error:  # this request ends; the engine goes on
                    self.batch.remove(row)
                    self._end(answer, "error", f"{type(error).__name__}: {error}")
        return True

    def _step(self) -> None:
        """Drop what was cancelled, decode one step, and end what is finished."""
        for running in [r for r in self.running if r.answer.is_cancelled]:
            self._leave(running, "cancelled")
        self.batch.step()
        tokens = 0
        for running in list(self.running):
            tokens += len(running.row.ids) - running.taken
            running.advance(self.batch.stop_ids)
            if running.row.finish_reason:
                self._leave(running, running.row.finish_reason)
        with self.changed:
            self.counts["steps"] += 1
            self.counts["generated_tokens"] += tokens

    def _leave(self, running: Running, reason: str, error: str = "") -> None:
        with self.changed:
            self.running.remove(running)
        if running.row in self.batch.rows:  # not after a failure
            self.batch.remove(running.row)
        self._end(running.answer, reason, error)

    def _end(self, answer: Answer, reason: str, error: str = "") -> None:
        answer.finish_reason, answer.error = reason, error
        with self.changed:
            self.counts["cancelled"] += reason == "cancelled"
            self.counts["errors"] += reason == "error"
        answer.put(None)

    def _fail(self, message: str) -> None:
        """End all running requests with an error."""
        self.batch.rows.clear()
        for running in list(self.running):
            self._leave(running, "error", message)
