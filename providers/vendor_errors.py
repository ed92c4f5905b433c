"""From a vendor's error answer to our closed list of codes: tables, and the little text work around them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import mktime_tz, parsedate_tz
from typing import Any

import msgspec

from engine.errors import ProviderError, ProviderErrorCode

from .sse import EventTooLargeError, SSEParser

MAX_MESSAGE_CHARS = 300

STATUS_CODES: dict[int, ProviderErrorCode] = {
    400: "upstream.invalid_request",
    401: "upstream.auth",
    402: "upstream.rate_limit",
    403: "upstream.auth",
    404: "upstream.invalid_request",
    408: "upstream.overloaded",
    409: "upstream.overloaded",
    413: "upstream.context_length",
    415: "upstream.invalid_request",
    422: "upstream.invalid_request",
    429: "upstream.rate_limit",
    503: "upstream.overloaded",
    529: "upstream.overloaded",
}

ERROR_NAMES: dict[str, ProviderErrorCode] = {
    "API_KEY_INVALID": "upstream.auth",
    "AccessDenied": "upstream.auth",
    "InvalidApiKey": "upstream.auth",
    "Model.AccessDenied": "upstream.auth",
    "authentication_error": "upstream.auth",
    "invalid_api_key": "upstream.auth",
    "permission_error": "upstream.auth",
    "Arrearage": "upstream.rate_limit",
    "Throttling": "upstream.rate_limit",
    "billing_error": "upstream.rate_limit",
    "billing_hard_limit_reached": "upstream.rate_limit",
    "insufficient_quota": "upstream.rate_limit",
    "rate_limit_error": "upstream.rate_limit",
    "rate_limit_exceeded": "upstream.rate_limit",
    "ModelServingError": "upstream.overloaded",
    "ModelUnavailable": "upstream.overloaded",
    "RequestTimeOut": "upstream.overloaded",
    "ServiceUnavailable": "upstream.overloaded",
    "overloaded_error": "upstream.overloaded",
    "engine_overloaded": "upstream.overloaded",
    "BadRequest.TooLarge": "upstream.context_length",
    "context_length_exceeded": "upstream.context_length",
    "exceed_context_size_error": "upstream.context_length",
    "request_too_large": "upstream.context_length",
    "string_above_max_length": "upstream.context_length",
    "DataInspectionFailed": "upstream.content_policy",
    "bio_policy": "upstream.content_policy",
    "content_filter": "upstream.content_policy",
    "content_policy_violation": "upstream.content_policy",
    "data_inspection_failed": "upstream.content_policy",
    "image_content_policy_violation": "upstream.content_policy",
    "invalid_prompt": "upstream.content_policy",
    "misalignment_policy_violation": "upstream.content_policy",
    "model_not_found": "upstream.invalid_request",
    "unsupported_image_media_type": "upstream.invalid_request",
    "InternalError": "upstream.server",
}
"""The names in a vendor's error object (Google's ``reason``, ``code``, ``type``) that say more than the HTTP status."""

GENERAL_ERROR_NAMES: dict[str, ProviderErrorCode] = {
    "BadRequest": "upstream.invalid_request",
    "InvalidParameter": "upstream.invalid_request",
    "InvalidURL": "upstream.invalid_request",
    "Model.NotFound": "upstream.invalid_request",
    "ModelNotFound": "upstream.invalid_request",
    "UnsupportedOperation": "upstream.invalid_request",
    "data_residency_mismatch": "upstream.invalid_request",
    "empty_image_file": "upstream.invalid_request",
    "failed_to_download_image": "upstream.invalid_request",
    "image_file_not_found": "upstream.invalid_request",
    "image_file_too_large": "upstream.invalid_request",
    "image_parse_error": "upstream.invalid_request",
    "image_too_large": "upstream.invalid_request",
    "image_too_small": "upstream.invalid_request",
    "invalid_base64_image": "upstream.invalid_request",
    "invalid_image": "upstream.invalid_request",
    "invalid_image_format": "upstream.invalid_request",
    "invalid_image_mode": "upstream.invalid_request",
    "invalid_image_url": "upstream.invalid_request",
    "invalid_request_error": "upstream.invalid_request",
    "not_found_error": "upstream.invalid_request",
    "server_error": "upstream.server",
    "api_error": "upstream.server",
}
"""Names that say less: OpenAI's 401 without a key is an ``invalid_request_error``, its 503 a ``server_error``."""

ERNIE_CODES: dict[int, ProviderErrorCode] = {
    1: "upstream.server",
    2: "upstream.overloaded",
    3: "upstream.invalid_request",
    4: "upstream.rate_limit",
    6: "upstream.auth",
    13: "upstream.auth",
    14: "upstream.auth",
    15: "upstream.auth",
    17: "upstream.rate_limit",
    18: "upstream.rate_limit",
    19: "upstream.rate_limit",
    100: "upstream.invalid_request",
    110: "upstream.auth",
    111: "upstream.auth",
    336000: "upstream.server",
    336001: "upstream.invalid_request",
    336002: "upstream.invalid_request",
    336003: "upstream.invalid_request",
    336004: "upstream.auth",
    336005: "upstream.invalid_request",
    336007: "upstream.context_length",
    336100: "upstream.overloaded",
    336101: "upstream.invalid_request",
    336103: "upstream.context_length",
    336104: "upstream.invalid_request",
    336105: "upstream.invalid_request",
    336501: "upstream.rate_limit",
    336502: "upstream.rate_limit",
}
"""Baidu's ``error_code``: ``APIErrorCode`` of the qianfan SDK 0.4.12, and 336007 and 336103 for texts too long."""

_TEXTS: tuple[tuple[re.Pattern[str], ProviderErrorCode], ...] = (
    (
        re.compile(
            r"context (?:length|window|size|limit)|range of input length|prompt tokens too long|max input characters"
            r"|prompt is too long|maximum number of tokens allowed|too many tokens: (?!max tokens)",
            re.IGNORECASE,
        ),
        "upstream.context_length",
    ),
    (re.compile(r"blocked by content filtering policy", re.IGNORECASE), "upstream.content_policy"),
)
"""What vendors that call everything an invalid request say in words alone."""

_ERROR_FIELDS = frozenset({"code", "error_code", "message"})
_SECRET = re.compile(
    r"\b(?:sk|key|pk|rk|gsk|xai|hf|nvapi)[-_][\w*.-]{6,}|\bBearer \S+|\bAIza\S+|[\w-]{32,}", re.IGNORECASE | re.ASCII
)
_UNFINISHED_WORD = re.compile(r"[!-~]+\Z")


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
    """The error for an HTTP answer that is no stream: a status other than 200, or a body that is none.

    ``body`` may be cut; only the vendor's own message is taken from it, bounded and without anything like a key.
    """
    error = _error_object(body)
    if status == 200:
        if error is not None:
            return error_from_object(error)
        kind = headers.get("content-type", "nothing")
        return ProviderError("upstream.protocol", f"the model's server answered with {kind[:80]}, not with a stream")
    code = _named_code(error, ERROR_NAMES) or _status_code(status)
    retry_after = retry_after_seconds(headers)
    if retry_after is None:
        retry_after = _retry_delay(error)
    return _provider_error(code, f"the model's server answered HTTP {status}", error, retry_after)


def error_from_object(error: Any) -> ProviderError:
    """The error for an ``error`` object in the stream or under HTTP 200: a dict, or just a text."""
    status = str(error.get("code")) if isinstance(error, dict) else ""
    code = (
        _named_code(error, ERROR_NAMES)
        or (_status_code(int(status)) if re.fullmatch("[45][0-9][0-9]", status) else None)
        or _named_code(error, GENERAL_ERROR_NAMES)
        or "upstream.server"
    )
    return _provider_error(code, "the model's server reported an error", error, _retry_delay(error))


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The vendor's wish from ``retry-after-ms`` or ``retry-after``, in seconds; None without a usable figure.

    A date counts from the answer's own ``Date``: no clock of ours comes in.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", value, re.ASCII):
            return float(value) * unit
    until, now = _timestamp(headers.get("retry-after", "")), _timestamp(headers.get("date", ""))
    return None if until is None or now is None else max(0.0, until - now)


def _retry_delay(error: Any) -> float | None:
    """The same wish in Google's words: ``RetryInfo`` among the error's details."""
    delays = [detail.get("retryDelay") for detail in _details(error)]
    found = (re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)s", delay, re.ASCII) for delay in delays if isinstance(delay, str))
    return next((float(match[1]) for match in found if match), None)


def _details(error: Any) -> list[dict[str, Any]]:
    """What Google's errors say for programs (google.rpc.Status)."""
    details = error.get("details") if isinstance(error, dict) else None
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _timestamp(http_date: str) -> float | None:
    try:
        parsed = parsedate_tz(http_date)
        return None if parsed is None else float(mktime_tz(parsed))
    except (ValueError, OverflowError):
        return None


def _error_object(body: bytes) -> Any:
    """The ``error`` of a JSON body, or the whole body where it is the error (DashScope, Baidu, Cohere, older vLLM)."""
    decoded = _decode(body)
    if isinstance(decoded, list) and decoded:
        decoded = decoded[0]  # Gemini (google-gemini/gemini-cli#11248)
    if not isinstance(decoded, dict):
        return None
    return decoded["error"] if "error" in decoded else decoded if decoded.keys() & _ERROR_FIELDS else None


def _decode(body: bytes) -> Any:
    """The JSON of the body, or of its first event: DashScope's HTTP 400 is an event stream labelled as JSON."""
    try:
        events = SSEParser().feed(body + b"\n\n")
        return msgspec.json.decode(events[0].data if events else body)
    except (EventTooLargeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _named_code(error: Any, codes: Mapping[str, ProviderErrorCode]) -> ProviderErrorCode | None:
    """By name; what follows a dot refines the name (``Throttling.RateQuota`` of DashScope)."""
    if not isinstance(error, dict):
        return None
    if isinstance(error.get("error_code"), int):
        return ERNIE_CODES.get(error["error_code"])
    reasons = [detail.get("reason") for detail in _details(error)]
    names = [name for name in (*reasons, error.get("code"), error.get("type")) if isinstance(name, str)]
    found = (codes.get(name) or codes.get(name.partition(".")[0]) for name in names)
    return next(filter(None, found), None)


def _status_code(status: int) -> ProviderErrorCode:
    if status in STATUS_CODES:
        return STATUS_CODES[status]
    if status >= 500:
        return "upstream.server"
    return "upstream.invalid_request" if status >= 300 else "upstream.protocol"


def _provider_error(code: ProviderErrorCode, what: str, error: Any, retry_after: float | None = None) -> ProviderError:
    """The error with the vendor's message, but for a refused key: vendors quote it."""
    if code == "upstream.auth":
        return ProviderError(code, f"{what}: it refused the key")
    message = error.get("message") or error.get("error_msg") if isinstance(error, dict) else error
    text = _presentable(message) if isinstance(message, str) else ""
    if code == "upstream.invalid_request":
        code = next((said for pattern, said in _TEXTS if pattern.search(text)), code)
    return ProviderError(code, f"{what}: {text}" if text else what, retry_after=retry_after)


def _presentable(message: str) -> str:
    """One line, bounded, without control characters and what may be a key; a cut leaves no part of one behind."""
    printable = "".join(char if char.isprintable() else " " for char in message)
    text = _SECRET.sub("[removed]", " ".join(printable.split()))
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    return _UNFINISHED_WORD.sub("", text[:MAX_MESSAGE_CHARS]) + "…"
