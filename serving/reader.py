"""From the engine's thread to the event loop: the answers of one request as they come, and their end."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from generation.engine import Piece
from serving.errors import ApiError

PING = 15.0  # seconds of silence after which a proxy might think that the connection is dead
LATE = 30.0  # seconds after which an engine that does not end its answers counts as dead


class Reader:
    """Submits a request's prompts and hears from the engine what comes of them."""

    def __init__(self, service: Any, prompts: Sequence[tuple[list[int], Any]], n: int):
        """prompts: ids and settings, n answers to each. After service.timeout seconds all of them are cut short."""
        self.loop, self.arrived = asyncio.get_running_loop(), service.arrived
        self.queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        self.deadline, self.timed_out = time.monotonic() + service.timeout, False
        self.answers = service.submit(prompts, n, self.notify)

    def notify(self, index: int, piece: Piece | None) -> None:
        """Take a piece in the engine's thread, which wakes the loop once for all that has come by then."""
        self.arrived.append((self.queue, (index, piece)))
        if len(self.arrived) == 1:  # or else the loop has been called and is not yet done
            with contextlib.suppress(RuntimeError):  # the loop has ended before the answer
                self.loop.call_soon_threadsafe(deliver, self.arrived)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None] | None]:
        """(number of the answer, piece), with None for a piece at an answer's end; None alone after a long silence."""
        left = len(self.answers)
        while left:
            remaining = PING if self.timed_out else min(PING, self.deadline - time.monotonic())
            try:
                item = await asyncio.wait_for(self.queue.get(), max(remaining, 0))
            except asyncio.TimeoutError:
                if not self.timed_out and time.monotonic() >= self.deadline:
                    self.timed_out = True
                    self.cancel()  # the answers end within a step, as they otherwise would
                elif time.monotonic() >= self.deadline + LATE:
                    raise ApiError(503, "服务没有响应，请重新启动它", "failed") from None
                else:
                    yield None
                continue
            left -= item[1] is None
            yield item

    def cancel(self) -> None:
        """Give up on all answers; their slots are free within a step."""
        for answer in self.answers:
            answer.cancel()

    def finish_reason(self, index: int) -> str:
        """Why an answer ended, "stop" or "length": what the time allowed counts as a length. ApiError if it failed."""
        answer = self.answers[index]
        if answer.finish_reason in ("stop", "length"):
            return answer.finish_reason
        if answer.finish_reason == "error":
            raise ApiError(500, f"生成时出错：{answer.error}", "generation_failed")
        if answer.completion_tokens:
            return "length"
        text = "在限定的时间内没有轮到这个请求" if self.timed_out else "服务正在关闭"
        code = "timeout" if self.timed_out else "closing"
        raise ApiError(503, text, code, headers={"Retry-After": "10"})


def deliver(arrived: deque[tuple[asyncio.Queue, Any]]) -> None:
    """Give what has come from the engine to those who wait for it, in the loop's thread."""
    while arrived:
        queue, item = arrived.popleft()
        queue.put_nowait(item)
