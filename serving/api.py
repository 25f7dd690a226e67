"""The routes: OpenAI's /v1, /health, /metrics, and the chat page."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from serving import errors
from serving.gate import Gate
from serving.reader import Reader
from serving.requests import NAMES, ChatRequest, CompletionRequest
from serving.responses import ChatCompletion, Completion, Health, Model, ModelList
from serving.service import Service
from serving.shapes import Shape

PAGE = Path(__file__).parent / "page"
WHY = {
    400: "请求不合要求，或提示词放不进上下文",
    401: "密钥不对",
    404: "没有这个模型",
    405: "方法不对",
    408: "请求体迟迟没有到齐",
    413: "请求体太大",
    429: "队列已满（Retry-After）",
    500: "生成时出错",
    503: "正在载入或关闭，或超过了时限",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of errors."""
    return {status: {"model": errors.ErrorBody, "description": WHY[status]} for status in statuses}


def with_stream(model: type) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of an answer that may also be a stream."""
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def create_app(
    service: Service, keys: Sequence[str] = (), max_body: int = 1 << 20, cors: Sequence[str] = ()
) -> FastAPI:
    """The application. keys: of which a request to /v1 needs one. cors: origins whose pages may use it."""
    app = FastAPI(title="Baby-Llama2-Chinese", version="1", docs_url=None, redoc_url=None)
    add_completions(app, service)
    add_rest(app, service)
    app.mount("/page", StaticFiles(directory=PAGE))
    errors.install(app, NAMES)
    app.add_middleware(Gate, service=service, keys=keys, max_body=max_body, timeout=service.timeout)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    make_openapi = app.openapi
    app.openapi = lambda: truthful(make_openapi())
    return app


def add_completions(app: FastAPI, service: Service) -> None:
    statuses = documented(400, 401, 404, 408, 413, 429, 500, 503)

    @app.post("/v1/chat/completions", responses=with_stream(ChatCompletion) | statuses)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """对话的下一个回答。"""
        service.check_model(body.model)
        service.check_count(body.n or 1)
        sampling = service.sampling(body)
        # Long texts take a while to tokenise.
        prompt = await run_in_threadpool(service.chat_prompt, body, sampling)
        return await respond("chatcmpl", body, request, [prompt], None)

    @app.post("/v1/completions", responses=with_stream(Completion) | statuses)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """一段或几段文字的续写。"""
        service.check_model(body.model)
        sampling, texts = service.sampling(body), body.prompts()
        service.check_count(len(texts) * (body.n or 1))
        prompts = await run_in_threadpool(
            lambda: [service.completion_prompt(text, body, sampling) for text in texts]
        )
        prefixes = None
        if body.echo:
            echoed = [text if isinstance(text, str) else service.decode(text) for text in texts]
            prefixes = [text for text in echoed for _ in range(body.n or 1)]
        return await respond("cmpl", body, request, prompts, prefixes)

    async def respond(
        kind: str, body: Any, request: Request, prompts: Sequence, prefixes: list[str] | None
    ) -> Response:
        reader = Reader(service, prompts, body.n or 1)
        shape = Shape(kind, service, reader, body.n or 1, prefixes, body.alternatives())
        if body.stream:
            return EventStream(reader, shape.events(body.wants_usage))
        whole = asyncio.ensure_future(shape.whole())
        gone = asyncio.ensure_future(disconnect(request))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return Response(status_code=499)  # nobody is there to read it
            return JSONResponse(whole.result().model_dump())
        finally:
            gone.cancel()
            whole.cancel()
            reader.cancel()


def add_rest(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/v1/models", responses=documented(401, 503))
    async def models() -> ModelList:
        """有哪些模型：一个。"""
        return ModelList(data=[service.model()])

    @app.get("/v1/models/{model:path}", responses=documented(401, 404, 503))
    async def one_model(model: str) -> Model:
        """一个模型。"""
        service.check_model(model)
        return service.model()

    @app.get("/health", responses={503: {"model": Health, "description": WHY[503]}})
    async def health(response: Response) -> Health:
        """可否使用：ok 时状态码 200，载入（loading）、关闭（closing）、出错（failed）时 503。"""
        state = service.health()
        response.status_code = 200 if state.status == "ok" else 503
        return state

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Prometheus 指标。"""
        return PlainTextResponse(service.metrics.text(service.stats()))


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, the answers do not outlive it."""

    def __init__(self, reader: Reader, events: Any):
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.reader = reader

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reader.cancel()


async def disconnect(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def truthful(schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI schema without the 422 that FastAPI puts everywhere: here a bad request is a 400."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)
    return schema
