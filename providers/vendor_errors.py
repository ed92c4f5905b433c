"""From a vendor's error answer to our closed list of codes: tables, and the little text work around them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.errors import ProviderError, ProviderErrorCode

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
    "authentication_error": "upstream.auth",
    "invalid_api_key": "upstream.auth",
    "permission_error": "upstream.auth",
    "insufficient_quota": "upstream.rate_limit",
    "rate_limit_error": "upstream.rate_limit",
    "rate_limit_exceeded": "upstream.rate_limit",
    "overloaded_error": "upstream.overloaded",
    "engine_overloaded": "upstream.overloaded",
    "context_length_exceeded": "upstream.context_length",
    "string_above_max_length": "upstream.context_length",
    "content_filter": "upstream.content_policy",
    "content_policy_violation": "upstream.content_policy",
    "invalid_request_error": "upstream.invalid_request",
    "model_not_found": "upstream.invalid_request",
    "server_error": "upstream.server",
    "api_error": "upstream.server",
}
"""The names in a vendor's error object (``code`` before ``type``); they say more than the HTTP status."""

_SECRET = re.compile(r"\b(?:sk|key|pk|rk|gsk|xai)[-_][\w*.-]{6,}|Bearer\s+\S+", re.IGNORECASE)


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
    code = STATUS_CODES.get(status, "upstream.server" if status >= 500 else "upstream.invalid_request")
    code = _named_code(error) or code
    if code == "upstream.auth":
        return ProviderError(code, f"the model's server refused the key (HTTP {status})")
    message = f"the model's server answered HTTP {status}" + _message_suffix(error)
    return ProviderError(code, message, retry_after=retry_after_seconds(headers))


def error_from_object(error: Any) -> ProviderError:
    """The error for an ``error`` object in the stream or under HTTP 200: a dict, or just a text."""
    status = error.get("code") if isinstance(error, dict) else None
    by_status = STATUS_CODES.get(status) if isinstance(status, int) else None
    code = _named_code(error) or by_status or "upstream.server"
    return ProviderError(code, "the model's server reported an error" + _message_suffix(error))


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The vendor's wish from ``retry-after-ms`` or ``retry-after``, in seconds; None without a usable figure."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", value, re.ASCII):
            return float(value) * unit
    return None


def _error_object(body: bytes) -> Any:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return decoded.get("error") if isinstance(decoded, dict) else None


def _named_code(error: Any) -> ProviderErrorCode | None:
    if not isinstance(error, dict):
        return None
    names = (error.get("code"), error.get("type"))
    return next((ERROR_NAMES[name] for name in names if isinstance(name, str) and name in ERROR_NAMES), None)


def _message_suffix(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str) or not message.strip():
        return ""
    return ": " + _SECRET.sub("[removed]", " ".join(message.split()))[:MAX_MESSAGE_CHARS]
