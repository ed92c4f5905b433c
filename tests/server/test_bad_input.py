"""What clients may send wrong: each gets its own answer in the error shape, starts no run, and is never a 500."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import DeadlineWish
from providers.chunked import LAST_CHUNK
from server.app import API
from server.doorkeeper import LINGER_SECONDS
from server.requests import BODY_SECONDS, MAX_BODY_BYTES, MAX_MESSAGE_CHARS
from tests.engine.scripted import ScriptedProvider, text
from tests.harness.world import STREAM_URL, World, open_world
from tests.server.raw_http import (
    CHAT_PATH,
    HEAD_END,
    RawAnswer,
    chunks,
    raw_client,
    request_bytes,
)

BASE = "http://lumos"
WHOLE_URL = STREAM_URL.removesuffix("/stream")
CHAT_URLS = [STREAM_URL, WHOLE_URL, f"{WHOLE_URL}/simulated"]
JSON = {"Content-Type": "application/json"}

NOT_JSON = {
    "empty": b"",
    "white space": b" \r\n\t",
    "not JSON": b"hello",
    "cut short": b'{"message":"hi"',
    "more than one value": b'{"message":"hi"} {}',
    "NaN": b'{"message":"hi","deadlines":{"total":NaN}}',
    "NaN in metadata": b'{"message":"hi","metadata":{"x":NaN}}',
    "Infinity": b'{"message":"hi","metadata":{"x":Infinity}}',
    "comment": b'{"message":"hi"} // hi',
    "single quotes": b"{'message':'hi'}",
    "trailing comma": b'{"message":"hi",}',
    "a raw newline in a string": b'{"message":"h\ni"}',
    "invalid UTF-8": b'{"message":"\xff"}',
    "UTF-8 cut short": b'{"message":"\xe6\x97"}',
    "invalid UTF-8 in a key": b'{"\xff":1}',
    "UTF-16": '{"message":"hi"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"message":"hi"}',
    "lone surrogate": b'{"message":"\\ud800"}',
    "lone low surrogate in metadata": b'{"message":"hi","metadata":{"\\udc00x":1}}',
    "deep nesting in metadata": b'{"message":"hi","metadata":{"x":' + b"[" * 100_000,
    "deep nesting of objects": b'{"message":"hi","metadata":' + b'{"x":' * 100_000,
    "deep nesting of nothing else": b"[" * 100_000,
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}

WRONG_SHAPE = {
    "array": b"[]",
    "array of bodies": b'[{"message":"hi"}]',
    "string": b'"hi"',
    "null": b"null",
    "number": b"1",
    "no message": b"{}",
    "message is null": b'{"message":null}',
    "message is a number": b'{"message":1}',
    "message is an object": b'{"message":{"role":"user","content":"hi"}}',
    "message is blank": b'{"message":" \\t\\n\\u3000"}',
    "message is empty": b'{"message":""}',
    "unknown field": b'{"message":"hi","mesage":"hi"}',
    "unknown field in stream": b'{"message":"hi","stream":{"buffer":1}}',
    "unknown field in deadlines": b'{"message":"hi","deadlines":{"totl":1}}',
    "metadata is an array": b'{"message":"hi","metadata":[]}',
    "user_id is a number": b'{"message":"hi","user_id":7}',
    "session_id is an object": b'{"message":"hi","session_id":{}}',
    "huge integer": b'{"message":"hi","metadata":{"x":' + b"9" * 5000 + b"}}",
    "huge integer as a deadline": b'{"message":"hi","deadlines":{"total":' + b"9" * 5000 + b"}}",
    "huge float": b'{"message":"hi","deadlines":{"total":1e999}}',
    "on_disconnect is unknown": b'{"message":"hi","on_disconnect":"explode"}',
    "on_disconnect is a boolean": b'{"message":"hi","on_disconnect":true}',
    "on_disconnect is null": b'{"message":"hi","on_disconnect":null}',
    "stream is a boolean": b'{"message":"hi","stream":true}',
    "text_buffer_size is 0": b'{"message":"hi","stream":{"text_buffer_size":0}}',
    "text_buffer_size is negative": b'{"message":"hi","stream":{"text_buffer_size":-1}}',
    "text_buffer_size is too large": b'{"message":"hi","stream":{"text_buffer_size":65537}}',
    "text_buffer_size is a fraction": b'{"message":"hi","stream":{"text_buffer_size":1.5}}',
    "text_delta_delay_ms is negative": b'{"message":"hi","stream":{"text_delta_delay_ms":-1}}',
    "text_delta_delay_ms is too long": b'{"message":"hi","stream":{"text_delta_delay_ms":10001}}',
    "emit_metadata is a number": b'{"message":"hi","stream":{"emit_metadata":1}}',
}


def assert_refused(answer: httpx.Response | RawAnswer, status: int, code: str) -> Any:
    """The answer is an error of that status and code, in the one shape; its payload."""
    status_code = answer.status if isinstance(answer, RawAnswer) else answer.status_code
    payload = answer.json()
    assert (status_code, payload["code"]) == (status, code), payload
    assert list(payload) == ["code", "message", "details", "timestamp"]
    assert isinstance(payload["message"], str)
    assert payload["message"]
    assert datetime.fromisoformat(payload["timestamp"]).utcoffset() is not None
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    return payload


@asynccontextmanager
async def world_that_starts_no_run() -> AsyncIterator[World]:
    """A world with agent ``demo``; fails if a run was started in it, or if the server does not answer in the end."""
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("hi"))))
        yield world
        assert world.supervisor.active_runs == 0
        assert world.journal.entries == []
        assert (await world.client.get(f"{BASE}/health/live")).status_code == 200


# Bodies


@pytest.mark.parametrize("url", CHAT_URLS, ids=lambda url: url.rpartition("/")[2])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_body_that_is_no_json_is_400(body: bytes, url: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world:
        assert_refused(await world.client.post(url, content=body, headers=JSON), 400, "INVALID_JSON")


@pytest.mark.parametrize("body", WRONG_SHAPE.values(), ids=WRONG_SHAPE)
async def test_json_of_another_shape_is_422(body: bytes, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world:
        assert_refused(await world.client.post(STREAM_URL, content=body, headers=JSON), 422, "VALIDATION_ERROR")


async def test_a_validation_error_names_the_field(autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world:
        body = {"message": "hi", "stream": {"text_buffer_size": 0}}
        payload = assert_refused(await world.client.post(STREAM_URL, json=body), 422, "VALIDATION_ERROR")
        assert "$.stream.text_buffer_size" in payload["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
async def test_another_content_type_is_415(content_type: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world:
        headers = {"Content-Type": content_type}
        response = await world.client.post(STREAM_URL, content=b'{"message":"hi"}', headers=headers)
        assert_refused(response, 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json;"])
async def test_json_is_known_by_its_media_type_alone(content_type: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("hi"))))
        headers = {"Content-Type": content_type}
        response = await world.client.post(WHOLE_URL, content=b'{"message":"hi"}', headers=headers)
        assert response.status_code == 200


@pytest.mark.parametrize("url", CHAT_URLS, ids=lambda url: url.rpartition("/")[2])
@pytest.mark.parametrize("agent_id", ["nobody", "Demo", "demo%20", "%00", "%FF", "..%2Fdemo"])
async def test_an_unknown_agent_is_404(agent_id: str, url: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world:
        response = await world.client.post(url.replace("demo", agent_id), json={"message": "hi"})
        assert_refused(response, 404, "NOT_FOUND")


# Sizes and times


async def test_a_message_up_to_the_limit_is_taken(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        provider = ScriptedProvider((1, text("hi")))
        world.add_agent(provider=provider)
        longest = "日" * MAX_MESSAGE_CHARS
        assert (await world.client.post(WHOLE_URL, json={"message": longest})).status_code == 200
        assert provider.requests[0].messages[-1].content == longest


async def test_a_message_over_the_limit_is_413(autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world:
        response = await world.client.post(STREAM_URL, json={"message": "x" * (MAX_MESSAGE_CHARS + 1)})
        assert_refused(response, 413, "PAYLOAD_TOO_LARGE")


async def test_a_body_that_is_declared_too_large_is_413_before_it_is_read(autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: lumos\r\nContent-Type: application/json\r\n"
        answer = await client.ask(f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        assert_refused(answer, 413, "PAYLOAD_TOO_LARGE")
        assert answer.json()["message"] == "the body is over 1 MiB"
        assert answer.headers["connection"] == "close"
        assert await client.read_to_end() == b""
        assert trio.current_time() == 0


async def test_a_client_that_keeps_connections_asks_on_after_a_413(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("hi"))))
        for _ in range(3):
            response = await world.client.post(WHOLE_URL, content=b"x" * (8 * MAX_BODY_BYTES), headers=JSON)
            assert_refused(response, 413, "PAYLOAD_TOO_LARGE")
            assert response.headers["Connection"] == "close"
            good = await world.client.post(WHOLE_URL, json={"message": "hi"})
            assert good.status_code == 200
            assert "Connection" not in good.headers


async def test_a_refusal_of_a_body_that_is_read_keeps_the_connection(autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        for _ in range(3):
            answer = await client.ask(request_bytes("POST", CHAT_PATH, b"[]"))
            assert "connection" not in answer.headers


async def test_a_chunked_body_is_413_once_it_is_too_large(autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:

        async def send_without_end() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await client.stream.send_all(chunks(b"x" * 65_536))
                    await trio.sleep(0.0625)

        headers = ["Content-Type: application/json", "Transfer-Encoding: chunked"]
        await client.stream.send_all(request_bytes("POST", CHAT_PATH, headers=headers))
        world.nursery.start_soon(send_without_end)
        assert_refused(await client.answer(), 413, "PAYLOAD_TOO_LARGE")
        assert trio.current_time() == 1, "when the limit was passed"
        assert await client.read_to_end() == b""
        await trio.sleep(10)
        (connection,) = world.network.connections
        assert connection.server.closed_at == 1 + LINGER_SECONDS, "so that the client can send on and read its answer"


async def test_a_chunked_body_that_is_too_large_is_answered(autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        headers = ["Content-Type: application/json", "Transfer-Encoding: chunked"]
        request = request_bytes("POST", CHAT_PATH, headers=headers) + chunks(b"x" * (MAX_BODY_BYTES + 1)) + LAST_CHUNK
        assert_refused(await client.ask(request), 413, "PAYLOAD_TOO_LARGE")


async def test_a_body_as_large_as_allowed_is_read(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("hi"))))
        body = msgspec.json.encode({"message": "hi", "metadata": {"x": ""}})
        body = body.replace(b'""', b'"%s"' % (b"x" * (MAX_BODY_BYTES - len(body))))
        assert len(body) == MAX_BODY_BYTES
        assert (await world.client.post(WHOLE_URL, content=body, headers=JSON)).status_code == 200


@pytest.mark.parametrize("bytes_a_second", [0, 1], ids=["nothing more", "a byte each second"])
async def test_a_slow_body_is_408_after_its_time(bytes_a_second: int, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        request = request_bytes("POST", CHAT_PATH, b'{"message":"' + b"x" * 1000 + b'"}')
        sent = request.index(HEAD_END) + 8

        async def drip() -> None:
            for at in range(sent, sent + bytes_a_second * (BODY_SECONDS - 1)):
                await trio.sleep(1)
                await client.stream.send_all(request[at : at + 1])

        world.nursery.start_soon(drip)
        answer = await client.ask(request[:sent])
        assert_refused(answer, 408, "REQUEST_TIMEOUT")
        assert answer.json()["message"] == "the body took over 20 s"
        assert trio.current_time() == BODY_SECONDS
        assert await client.read_to_end() == b""


async def test_a_slow_body_that_comes_in_time_is_read(autojump_clock: MockClock) -> None:
    async with open_world() as world, raw_client(world) as client:
        world.add_agent(provider=ScriptedProvider((1, text("hi"))))
        request = request_bytes("POST", CHAT_PATH.removesuffix("/stream"), b'{"message":"hi"}')
        await client.stream.send_all(request[:-1])
        await trio.sleep(BODY_SECONDS - 1)
        assert (await client.ask(request[-1:])).status == 200


# Deadlines


@pytest.mark.parametrize("name", DeadlineWish.__struct_fields__)
async def test_a_deadline_longer_than_the_agents_is_422_and_tells_what_is_allowed(
    name: str, autojump_clock: MockClock
) -> None:
    async with world_that_starts_no_run() as world:
        allowed = getattr(world.agents["demo"].deadlines, name)
        body = {"message": "hi", "deadlines": {name: allowed + 0.001}}
        payload = assert_refused(await world.client.post(STREAM_URL, json=body), 422, "VALIDATION_ERROR")
        assert payload["details"] == {"field": f"deadlines.{name}", "allowed": allowed}


@pytest.mark.parametrize("name", DeadlineWish.__struct_fields__)
@pytest.mark.parametrize("value", [0, -0.0, -1, -1e308, "5", "inf", True, [], {}], ids=repr)
async def test_a_deadline_that_is_no_number_above_zero_is_422(
    value: object, name: str, autojump_clock: MockClock
) -> None:
    async with world_that_starts_no_run() as world:
        body = {"message": "hi", "deadlines": {name: value}}
        assert_refused(await world.client.post(STREAM_URL, json=body), 422, "VALIDATION_ERROR")


async def test_deadlines_up_to_the_agents_are_taken(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("hi"))))
        allowed = msgspec.to_builtins(world.agents["demo"].deadlines)
        for wish in ({}, {"total": None}, {"total": 1.5}, {"total": 2}, allowed):
            answer = await world.chat(deadlines=wish)
            assert str(answer.events[-1].__struct_config__.tag) == "done"


# Methods, paths and heads


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT_PATH, {"POST", "OPTIONS"}),
        ("HEAD", CHAT_PATH, {"POST", "OPTIONS"}),
        ("PUT", CHAT_PATH, {"POST", "OPTIONS"}),
        ("GET", CHAT_PATH.removesuffix("/stream"), {"POST", "OPTIONS"}),
        ("POST", f"{API}/runs/x", {"GET", "HEAD", "DELETE", "OPTIONS"}),
        ("POST", f"{API}/runs/x/events", {"GET", "HEAD", "OPTIONS"}),
        ("DELETE", f"{API}/runs/x/events", {"GET", "HEAD", "OPTIONS"}),
        ("GET", f"{API}/runs/x/stop", {"POST", "OPTIONS"}),
        ("POST", "/health/live", {"GET", "HEAD", "OPTIONS"}),
        ("BREW", "/health/live", {"GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_a_wrong_method_is_405_and_tells_the_right_ones(
    method: str, path: str, allowed: set[str], autojump_clock: MockClock
) -> None:
    async with world_that_starts_no_run() as world:
        response = await world.client.request(method, BASE + path)
        assert set(response.headers["Allow"].split(", ")) == allowed
        if method == "HEAD":
            assert (response.status_code, response.content) == (405, b"")
        else:
            assert_refused(response, 405, "METHOD_NOT_ALLOWED")
            taken = ", ".join(sorted(allowed))
            assert response.json()["message"] == f"this path does not take {method}; it takes {taken}"


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/api/v1", "/api/v1/agents/demo/chat", "/api/v2/runs/x", CHAT_PATH + "/", "/%00", "/%ff", "/a" * 5000],
    ids=lambda path: path[:30],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_unknown_path_is_404(method: str, path: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world:
        response = await world.client.request(method, BASE + path)
        assert_refused(response, 404, "NOT_FOUND")
        assert response.json()["message"] == "there is nothing at this path"


@pytest.mark.parametrize(
    "target",
    [
        "*",
        "?",
        "?x=1",
        "#x",
        "x",
        "lumos:80",
        "http://[",
        "http://lumos/nothing",
        "/%",
        "/%zz?%ff=%",
        "//lumos//nothing",
        "/..//..",
        "/\x7f",
    ],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "CONNECT"])
async def test_an_odd_target_is_a_fault_of_the_client(method: str, target: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        answer = await client.ask(request_bytes(method, target))
        assert answer.status in {308, 400, 404, 405}


@pytest.mark.parametrize(
    "host", [".", ".lumos", "lumos..", "a b", "lumos:x", "l\xfcmos", "[", "%6c", "lumos/x", "@lumos"]
)
async def test_a_host_that_cannot_be_is_a_400(host: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        request = request_bytes("GET", "/health/live").replace(b"Host: lumos", f"Host: {host}".encode("latin-1"))
        assert (await client.ask(request)).status == 400


@pytest.mark.parametrize(
    "host", ["", "lumos.", "LUMOS:80", "lumos:", "[::1]:8080", "127.0.0.1", "my_host", "xn--lmos-0ra"]
)
async def test_a_host_that_can_be_is_served(host: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        request = request_bytes("GET", "/health/live").replace(b"Host: lumos", f"Host: {host}".encode("latin-1"))
        assert (await client.ask(request)).status == 200


async def test_a_full_url_as_target_is_the_path_in_it(autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        for target, status in (("http://lumos/health/live", 200), ("http://lumos", 302), ("http://lumos?x", 422)):
            assert (await client.ask(request_bytes("GET", target))).status == status


@pytest.mark.parametrize(
    "header",
    [
        "Host: other",
        "Content-Length: -1",
        "Content-Length: x",
        "Content-Length: 1, 2",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: chunked\r\nContent-Length: 1",
        "No colon",
        " Folded: x",
        "N\u00e4me: x",
        "Null: a\0b",
        ": x",
    ],
    ids=lambda header: repr(header[:30]),
)
async def test_an_odd_head_is_a_fault_of_the_client(header: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        answer = await client.ask(request_bytes("POST", CHAT_PATH, headers=[header]))
        assert answer.status in {400, 415, 501}


@pytest.mark.parametrize(
    "header",
    [
        "Accept: \xff",
        "Cookie: \xff=\xff",
        "Authorization: \xff",
        "Content-Type: \xff; \xff=\xff",
        "Host: \xff",
        "A: \xff",
    ],
)
async def test_bytes_outside_ascii_in_a_header_are_no_bug(header: str, autojump_clock: MockClock) -> None:
    async with world_that_starts_no_run() as world, raw_client(world) as client:
        assert (await client.ask(request_bytes("GET", "/nothing", headers=[header]))).status in {400, 404}
