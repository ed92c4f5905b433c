"""What a vendor's error answer becomes: a code of the closed list, and a text that is safe to show."""

from __future__ import annotations

import time
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import PROVIDER_ERROR_CODES, ProviderError
from providers.vendor_errors import MAX_MESSAGE_CHARS, error_from_object, error_from_response, retry_after_seconds

JSON = {"content-type": "application/json"}
LONGEST_TEXT = MAX_MESSAGE_CHARS + 100


def answered(status: int, body: Any = b"", **headers: str) -> ProviderError:
    """The error for this answer; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return error_from_response(status, httpx.Headers(JSON | sent), data)


def error(message: str = "m", **fields: Any) -> dict[str, Any]:
    """An error body as OpenAI and most others write it."""
    return {"error": {"message": message} | fields}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "upstream.invalid_request"),
        (401, "upstream.auth"),
        (402, "upstream.rate_limit"),
        (403, "upstream.auth"),
        (404, "upstream.invalid_request"),
        (408, "upstream.overloaded"),
        (409, "upstream.overloaded"),
        (413, "upstream.context_length"),
        (415, "upstream.invalid_request"),
        (418, "upstream.invalid_request"),
        (422, "upstream.invalid_request"),
        (429, "upstream.rate_limit"),
        (500, "upstream.server"),
        (502, "upstream.server"),
        (503, "upstream.overloaded"),
        (504, "upstream.server"),
        (529, "upstream.overloaded"),
        (599, "upstream.server"),
        (302, "upstream.invalid_request"),
        (204, "upstream.protocol"),
    ],
)
def test_a_status_alone_has_a_code(status: int, code: str) -> None:
    raised = answered(status)
    assert (raised.code, raised.retry_after) == (code, None)
    assert f"HTTP {status}" in str(raised)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (401, error(type="invalid_request_error", code="invalid_api_key"), "upstream.auth"),
        (401, error("You didn't provide an API key", type="invalid_request_error", code=None), "upstream.auth"),
        (400, error(type="authentication_error"), "upstream.auth"),
        (403, error(type="permission_error"), "upstream.auth"),
        (400, error(type="invalid_request_error", code="context_length_exceeded"), "upstream.context_length"),
        (400, error("This model's maximum context length is 4096", code=None), "upstream.context_length"),
        (400, error("exceeds the available context size", type="exceed_context_size_error"), "upstream.context_length"),
        (413, error(type="request_too_large"), "upstream.context_length"),
        (400, error(code="content_policy_violation"), "upstream.content_policy"),
        (400, error(type="content_filter", code="content_filter"), "upstream.content_policy"),
        (404, error(type="invalid_request_error", code="model_not_found"), "upstream.invalid_request"),
        (429, error(type="insufficient_quota", code="insufficient_quota"), "upstream.rate_limit"),
        (429, error(type="requests", code="rate_limit_exceeded"), "upstream.rate_limit"),
        (429, error(type="invalid_request_error"), "upstream.rate_limit"),
        (500, error(type="server_error"), "upstream.server"),
        (503, error("The engine is overloaded", type="server_error"), "upstream.overloaded"),
        (529, error(type="overloaded_error"), "upstream.overloaded"),
        (500, error(type="api_error"), "upstream.server"),
        (400, {"object": "error", "message": "no such model", "code": 400}, "upstream.invalid_request"),
        (200, error(type="overloaded_error"), "upstream.overloaded"),
        (200, error(code=429), "upstream.rate_limit"),
        (200, {"id": "chatcmpl-1", "choices": []}, "upstream.protocol"),
        (200, b"<html>", "upstream.protocol"),
        (200, b"", "upstream.protocol"),
    ],
)
def test_status_and_body_together_have_a_code(status: int, body: Any, code: str) -> None:
    assert answered(status, body).code == code


@pytest.mark.parametrize(
    ("named", "code"),
    [
        ({"type": "overloaded_error"}, "upstream.overloaded"),
        ({"type": "invalid_request_error", "code": "context_length_exceeded"}, "upstream.context_length"),
        ({"type": "invalid_request_error"}, "upstream.invalid_request"),
        ({"type": "server_error", "code": None}, "upstream.server"),
        ({"type": "server_error", "code": 429}, "upstream.rate_limit"),
        ({"code": "503"}, "upstream.overloaded"),
        ({"code": 502}, "upstream.server"),
        ({"code": 1301}, "upstream.server"),
        ({"code": True}, "upstream.server"),
        ({"code": ["x"], "type": {}}, "upstream.server"),
        ({"type": "never heard of"}, "upstream.server"),
        ({}, "upstream.server"),
        ("Internal error", "upstream.server"),
        (7, "upstream.server"),
        ([], "upstream.server"),
    ],
)
def test_an_error_in_the_stream_has_a_code(named: Any, code: str) -> None:
    assert error_from_object(named).code == code


def test_the_vendors_own_words_are_kept() -> None:
    assert str(error_from_object("Out of\n capacity")) == "the model's server reported an error: Out of capacity"
    assert str(answered(400, error("模型不存在"))) == "the model's server answered HTTP 400: 模型不存在"
    assert str(answered(400, error("  \n"))) == "the model's server answered HTTP 400"


@pytest.mark.parametrize(
    "body",
    [
        b"<html><body>sk-secret</body></html>",
        b"\xff\xfe\x00",
        b"{" * 5000,
        b"[" * 100_000,
        b'{"error": {"message": "cut',
        b'{"error": {"message": "\\ud800"}}',
        b"[]",
        b"null",
        b'"secret"',
        b'{"error": null}',
        b'{"error": {"message": null}}',
        b'{"error": {"message": {"deep": 1}}}',
        b'{"error": ["secret"]}',
        b'{"detail": "secret"}',
    ],
)
def test_a_body_that_says_nothing_usable_leaves_the_status(body: bytes) -> None:
    raised = answered(500, body)
    assert (raised.code, str(raised)) == ("upstream.server", "the model's server answered HTTP 500")


def test_what_came_instead_of_a_stream_is_named() -> None:
    raised = error_from_response(200, httpx.Headers({"content-type": "text/html" + "x" * 9000}), b"<html>")
    assert str(raised).startswith("the model's server answered with text/html")
    assert len(str(raised)) < LONGEST_TEXT
    assert "answered with nothing" in str(error_from_response(200, httpx.Headers(), b""))


KEYS = [
    "sk-proj-abcDEF123456",
    "sk-ant-api03-abc_def",
    "sk-********************7890",
    "gsk_abcdefghijkl",
    "AIzaSyA-abcdefghijklmnop",
    "hf_abcdefgh",
    "0123456789abcdef0123456789abcdef",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.payload",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("text", ["Bad key {}.", "key={} is bad", "密钥{}无效", '("{}")', "Authorization: Bearer {}"])
def test_what_looks_like_a_key_is_removed(key: str, text: str) -> None:
    shown = str(answered(400, error(text.format(key))))
    assert "[removed]" in shown
    assert key.split(".", maxsplit=1)[0][3:] not in shown


def test_a_refused_key_is_not_quoted_at_all() -> None:
    message = "Incorrect API key provided: abc. You can find your key at https://x"
    assert str(answered(401, error(message))) == "the model's server answered HTTP 401: it refused the key"
    assert "abc" not in str(error_from_object({"type": "authentication_error", "message": message}))


@pytest.mark.parametrize("length", range(MAX_MESSAGE_CHARS - 30, MAX_MESSAGE_CHARS + 3))
def test_a_cut_leaves_no_part_of_a_key_behind(length: int) -> None:
    shown = str(answered(400, error("x " * (length // 2) + "A1b2C3d4E5f6 more")))
    assert "A1b2" not in shown or "A1b2C3d4E5f6" in shown


def test_a_long_message_is_cut() -> None:
    assert len(str(answered(400, error("word " * 10_000)))) < LONGEST_TEXT
    assert len(str(answered(400, error("字" * 10_000)))) > MAX_MESSAGE_CHARS
    assert str(answered(400, error("字" * 10_000))).endswith("字…")


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert str(answered(400, error("a\x1b[31mb\x00c\u202ed"))).endswith(": a [31mb c d")


def test_a_huge_message_takes_no_time() -> None:
    started = time.perf_counter()
    for filler in ("a", "a.", "a-", "sk-", "Bearer ", " ", "\u202e"):
        answered(400, error(filler * (60_000 // len(filler))))
    assert time.perf_counter() - started < 2


MONDAY = "Mon, 23 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "36000"}, 36_000.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "1"}, 1.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "1_0"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": "9" * 4000}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Mon, 23 Nov 2026 10:01:30 GMT", "date": MONDAY}, 90.0),
        ({"retry-after": "Mon, 23 Nov 2026 09:00:00 GMT", "date": MONDAY}, 0.0),
        ({"retry-after": "Mon, 23 Nov 2026 10:01:30 GMT"}, None),
        ({"retry-after": "Mon, 23 Nov 2026 10:01:30 GMT", "date": "today"}, None),
        ({"retry-after": "Mon, 23 Nov 2026 10:01:30", "date": MONDAY}, 90.0),
        ({"retry-after": "Mon, 99 Nov 99999999999 10:01:30 GMT", "date": MONDAY}, None),
        ({"retry-after": "7", "date": MONDAY}, 7.0),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    encoded = httpx.Headers([(name.encode(), value.encode()) for name, value in headers.items()])
    assert retry_after_seconds(encoded) == seconds


def test_the_error_carries_retry_after() -> None:
    assert answered(429, error("slow down"), retry_after="7").retry_after == 7.0
    assert answered(503, b"", retry_after_ms="1500").retry_after == 1.5


@given(st.text(max_size=60))
def test_no_retry_after_raises(value: str) -> None:
    for now in ({}, {"date": MONDAY}):
        seconds = retry_after_seconds({"retry-after": value, **now})
        assert seconds is None or seconds >= 0


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["429", "api_error"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "message", "code", "type", "object"]), inner, max_size=4)
    ),
)


@given(status=st.integers(100, 599), body=VALUE.map(msgspec.json.encode) | st.binary(max_size=50))
def test_no_answer_raises_and_every_code_is_of_the_list(status: int, body: bytes) -> None:
    raised = error_from_response(status, httpx.Headers(JSON), body)
    assert raised.code in PROVIDER_ERROR_CODES
    assert len(str(raised)) < LONGEST_TEXT
