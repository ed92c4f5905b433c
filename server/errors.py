"""HTTP errors in one shape: ``{code, message, details, timestamp}``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from .refusals import RefusalLog

_MIB = 2**20

RETRY_AFTER_SECONDS = 5

_CODES = {413: "PAYLOAD_TOO_LARGE"}  # where ours is not Werkzeug's name for the status

_logger = structlog.get_logger("lumos")
_refusals = RefusalLog()


class Refusal(msgspec.Struct, frozen=True):
    """An error as clients see it.

    Attributes:
        code: which error, for programs: the status's name, or a run's error code.
        message: what is wrong, for people.
        details: more of it, as the field's name; null without.
        timestamp: UTC, ISO 8601.
    """

    code: str
    message: str
    details: Any
    timestamp: str


class ApiError(Exception):
    """A request that is refused before anything is started; becomes the HTTP answer."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.headers = dict(headers or {})


def not_found(what: str, name: str) -> ApiError:
    """404 for a thing that is not there, or not the caller's: both look the same."""
    return ApiError(404, "NOT_FOUND", f"there is no {what} {name[:100]!r}")


def bare_refusal(message: str) -> bytes:
    """The body of a 503 from where there is no app to answer: without details, and without a time."""
    body = {"code": "SERVICE_UNAVAILABLE", "message": message, "details": None, "timestamp": None}
    return msgspec.json.encode(body)


def bare_answer(message: str) -> bytes:
    """A whole 503 with that body, after which the connection closes."""
    body = bare_refusal(message)
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
        b"Retry-After: %d\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (RETRY_AFTER_SECONDS, len(body), body)
    )


def draining() -> ApiError:
    """503 while the server shuts down."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, "SERVICE_UNAVAILABLE", "the server is shutting down", headers=headers)


def json_response(payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer that no cache keeps."""
    response = Response(msgspec.json.encode(payload), status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    response.headers.update(headers or {})
    return response


def install_error_handlers(app: QuartTrio) -> None:
    """Make every error of the app's an answer in our shape and our words, bugs too."""
    words = {
        400: "the request is malformed",
        404: "there is nothing at this path",
        408: f"the body took over {app.config['BODY_TIMEOUT']:g} s",
        413: f"the body is over {app.config['MAX_CONTENT_LENGTH'] / _MIB:g} MiB",
    }

    async def answer_http_exception(error: HTTPException) -> Response:
        status = error.code or 500
        code = _CODES.get(status) or error.name.upper().replace(" ", "_").replace("'", "")
        if isinstance(error, MethodNotAllowed):
            return await _answer_api_error(_wrong_method(error))
        return await _answer_api_error(ApiError(status, code, words.get(status, str(error.description))))

    app.register_error_handler(ApiError, _answer_api_error)
    app.register_error_handler(HTTPException, answer_http_exception)
    app.register_error_handler(Exception, _answer_bug)


async def answer_error(error: BaseException) -> Response:
    """What a handler raised as its answer; of several at once, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return await (_answer_api_error(error) if isinstance(error, ApiError) else _answer_bug(error))


async def _answer_api_error(error: ApiError) -> Response:
    _refusals.tell(error.status, error.code)
    refusal = Refusal(error.code, error.message, error.details, datetime.now(UTC).isoformat())
    return json_response(refusal, error.status, error.headers)


def _wrong_method(error: MethodNotAllowed) -> ApiError:
    allowed = ", ".join(sorted(error.valid_methods or ()))
    message = f"this path does not take {request.method[:100]}; it takes {allowed}"
    return ApiError(405, "METHOD_NOT_ALLOWED", message, headers={"Allow": allowed})


async def _answer_bug(error: BaseException) -> Response:
    _logger.error("request.crashed", exc_info=error)
    return await _answer_api_error(ApiError(500, "INTERNAL_ERROR", "internal error"))
