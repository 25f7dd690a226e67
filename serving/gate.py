"""What every request passes before the application sees it: the key, the size and the time of its body."""

import asyncio
import hmac
import time
import traceback
from collections.abc import Sequence
from typing import Any

from serving.errors import ApiError
from serving.service import Service

# The page runs no script and loads nothing but its own files, whatever an answer contains
# (https://developer.mozilla.org/en-US/docs/Web/HTTP/Guides/CSP).
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
EXTRA = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
KNOWN = {*COMPLETIONS, "/v1/models", "/health", "/metrics", "/openapi.json", "/"}
DRAIN = 64 << 20  # bytes of a body that is refused which are read all the same


class Gate:
    """ASGI middleware (https://asgi.readthedocs.io/en/latest/specs/www.html) around the whole application."""

    def __init__(self, app: Any, service: Service, keys: Sequence[str], max_body: int, timeout: float):
        """max_body: bytes. timeout: seconds that a client may take to send a body."""
        self.app, self.service = app, service
        self.keys = [key.encode() for key in keys]
        self.max_body, self.timeout = max_body, timeout

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD":  # the answer of a GET, of which uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        start, status = time.monotonic(), 499  # as nginx calls a client that has gone

        async def counted(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *EXTRA]}
            await send(message)

        try:
            if scope["path"].startswith("/v1/") and scope["method"] != "OPTIONS":
                self.check_key(scope)
            receive = replay(await self.body(scope, receive), receive)
            await self.app(scope, receive, counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except Exception:
            if status != 499:  # too late for an answer
                raise
            traceback.print_exc()
            error = ApiError(500, "服务器内部错误，详见服务器的输出", "internal_error")
            await error.response()(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in KNOWN else "other"
            self.service.metrics.requests[path, status] += 1
            if path in COMPLETIONS:
                self.service.metrics.request_seconds.observe(time.monotonic() - start)

    def check_key(self, scope: dict) -> None:
        """ApiError 401 unless the request has one of the keys; the time it takes tells nothing about them."""
        if not self.keys:
            return
        kind, _, given = header(scope, b"authorization").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        if kind.lower() != b"bearer" or not any(matches):
            text = "密钥不对或没有密钥；请用请求头 Authorization: Bearer 密钥"
            raise ApiError(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def body(self, scope: dict, receive: Any) -> bytes:
        """The whole body. ApiError 413 if it is too large, 408 if it takes too long."""
        length = header(scope, b"content-length")
        declared = int(length) if length.isdigit() else 0
        parts, size = [], 0
        try:
            more = declared <= DRAIN
            while more:
                message = await asyncio.wait_for(receive(), self.timeout)
                if message["type"] == "http.disconnect":
                    break
                size += len(message.get("body", b""))
                # A client that is still sending would see a broken connection, not the answer: read on, keep nothing.
                if size <= self.max_body:
                    parts.append(message.get("body", b""))
                more = message.get("more_body", False) and size <= DRAIN
        except asyncio.TimeoutError as error:
            raise ApiError(408, "请求体在限定的时间内没有到齐", "timeout") from error
        if max(size, declared) > self.max_body:
            raise ApiError(413, f"请求体超过 {self.max_body} 字节的限制", "request_too_large")
        return b"".join(parts)


def header(scope: dict, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def replay(body: bytes, receive: Any) -> Any:
    """A `receive` that gives a body that has been read, and then what else comes: that the client has gone."""
    is_given = False

    async def again() -> dict:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
