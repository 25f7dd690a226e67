"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}} (https://platform.openai.com/docs/guides/error-codes)."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
CONTEXT = "context_length_exceeded"

# What pydantic finds (https://docs.pydantic.dev/latest/errors/validation_errors/), for users.
MESSAGES = {
    "missing": "缺少这一项",
    "extra_forbidden": "没有这个参数",
    "string_type": "应为字符串",
    "string_unicode": "不是合法的文字（含落单的代理字符）",
    "string_too_short": "不能为空",
    "string_too_long": "至多 {max_length} 个字符",
    "int_type": "应为整数",
    "float_type": "应为数",
    "finite_number": "应为有限的数",
    "bool_type": "应为 true 或 false",
    "list_type": "应为列表",
    "dict_type": "应为 JSON 对象",
    "model_type": "应为 JSON 对象",
    "model_attributes_type": "应为 JSON 对象（Content-Type: application/json）",
    "greater_than": "应大于 {gt}",
    "greater_than_equal": "应不小于 {ge}",
    "less_than": "应小于 {lt}",
    "less_than_equal": "应不大于 {le}",
    "literal_error": "应为 {expected}",
    "too_short": "至少要有 {min_length} 项",
    "too_long": "至多 {max_length} 项",
    "json_invalid": "不是合法的 JSON",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error answers with."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error; `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        # What users sent may have lone surrogates, which have no UTF-8 form.
        message, param = (x and x.encode(errors="replace").decode() for x in (message, param))
        self.status, self.headers = status, headers
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def from_validation(errors: Sequence[Mapping[str, Any]], names: set[str]) -> ApiError:
    """What pydantic found wrong: one thing of it. names: of all parameters, which its paths mix with names of types.

    A value that may have several types is wrong for each of them; what lies deepest, or is no matter of type, tells of
    the type that was meant.
    """
    first = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part in names]
    if first["type"] == "extra_forbidden":
        path.append(str(first["loc"][-1])[:100])
    param = None if first["type"] == "json_invalid" else ".".join(path) or None
    text = MESSAGES.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
    return ApiError(400, f"{param or '请求体'}：{text}", first["type"], param)


def install(app: FastAPI, names: set[str]) -> None:
    """Give every error of the application OpenAI's shape."""

    async def known(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors(), names).response()

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        reasons = {404: "没有这个地址", 405: "这个地址不接受这种方法", 400: "请求体不是合法的 JSON"}
        message = reasons.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
