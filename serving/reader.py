"""From the engine's threads to the event loop: the answers of one request as they come, and their end."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Sequence

from generation.engine import Answer, Piece
from serving.errors import ApiError

PING = 15.0  # seconds of silence after which a proxy might think that the connection is dead
LATE = 30.0  # seconds after which an engine that does not end its answers counts as dead


class Reader:
    """Reads the answers of a request, each by a thread that waits for the engine so that the event loop does not."""

    def __init__(self, answers: Sequence[Answer], timeout: float):
        """timeout: seconds from now until all of them are cut short."""
        self.answers = answers
        self.deadline = time.monotonic() + timeout
        self.timed_out = False
        self.queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for index, answer in enumerate(answers):
            threading.Thread(target=self._pump, args=(loop, index, answer), daemon=True).start()

    def _pump(self, loop: asyncio.AbstractEventLoop, index: int, answer: Answer) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before the answer
            for piece in answer:
                loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))
            loop.call_soon_threadsafe(self.queue.put_nowait, (index, None))

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
