"""Requests prepared once and plain answers read without h11: whatever comes, no otherwise than with h11."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import h11
import httpx
import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from providers.connection import ResponseBody
from providers.heads import PreparedHead, parse_plain_head
from providers.http import VendorRequest, open_client, stream_answer
from providers.openai_chat import ChatDecoder
from providers.transport import Prepared, TrioTransport

from .scripted_network import URL, ScriptedNetwork, answering, chunk, chunked_head, saying, with_length
from .test_transport import UNFIT
from .test_transport_body import BROKEN, WHOLE

HEAD = chunked_head()
LINES = [
    b"HTTP/1.1 200 OK",
    b"HTTP/1.1 200",
    b"HTTP/1.0 200 OK",
    b"HTTP/1.1 100 Continue",
    b"HTTP/1.1 204 No Content",
    b"HTTP/1.1 429 Slow Down",
    b"HTTP/1.1 200 \x00",
]
FIELDS = [
    b"Content-Type: text/event-stream",
    b"Transfer-Encoding: chunked",
    b"transfer-encoding:\tCHUNKED \t",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: gzip",
    b"X: a\r\n Transfer-Encoding: chunked",
    b"Content-Length: 5",
    b"Content-Length: 5, 5",
    b"Connection: keep-alive",
    b"Connection: close",
    b"Connection: keep-alive, close",
    b"Upgrade: h2c",
    b"X-Odd: \xff\x01",
    b"X-Empty:",
    b": nameless",
    b"no colon",
]
ENDS = [b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]


class Outcome:
    """What one way of asking makes of a server: head, the body's reads with their times, the error, what is kept."""

    def __init__(self, parts: list[bytes], then_close: bool) -> None:
        self._parts, self._then_close = parts, then_close
        self.seen: list[Any] = []

    async def by_httpx(self, transport: TrioTransport) -> None:
        """h11 from the first byte on."""
        response = await transport.handle_async_request(httpx.Request("POST", URL, content=b"{}"))
        headers = [(name.lower(), value) for name, value in response.headers.raw]
        await self._read(response.status_code, headers, response.extensions["body"])

    async def prepared(self, transport: TrioTransport) -> None:
        """h11 only for what is not plain."""
        head, body = await transport.post(Prepared.of(httpx.Request("POST", URL)), b"{}", lambda: None)
        await self._read(head.status_code, [(name.lower(), value) for name, value in head.headers], body)

    async def _read(self, status: int, headers: list[tuple[bytes, bytes]], body: ResponseBody) -> None:
        self.seen.append((trio.current_time(), status, headers))
        try:
            while data := await body.receive():
                self.seen.append((trio.current_time(), data))
        finally:
            await body.aclose()

    async def of(self, way: str) -> list[Any]:
        """All that is seen."""
        self.seen = []
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            network = ScriptedNetwork(nursery, saying(*self._parts, then_close=self._then_close))
            transport = TrioTransport(network)
            with trio.move_on_after(1000) as limit:
                try:
                    await getattr(self, way)(transport)
                except httpx.TransportError as error:
                    self.seen += [type(error), str(error), type(error.__cause__), str(error.__cause__)]
            self.seen += [limit.cancelled_caught, transport.open_connections, transport.idle_connections]
            self.seen.append(network.servers[0].requests[0].body)
            await transport.aclose()
            nursery.cancel_scope.cancel()
        return [(seen[0] - begun, *seen[1:]) if isinstance(seen, tuple) else seen for seen in self.seen]


async def assert_same(parts: list[bytes], then_close: bool) -> None:
    outcome = Outcome(parts, then_close)
    assert await outcome.of("prepared") == await outcome.of("by_httpx")


ANSWERS = {
    **{name: [answer] for name, answer in WHOLE.items()},
    **{name: parts for name, (_, _, parts) in BROKEN.items()},
    **{name: [answer] for name, answer in UNFIT.items()},
    "an error": [with_length(b"no", "Retry-After: 7", status="429 Slow Down")],
    "bytes after the last chunk": [HEAD + chunk(b"a") + chunk(b"") + b"x"],
    "the last chunk in two": [HEAD + chunk(b"a") + b"0\r\n", b"\r\n"],
    "the last chunk alone": [HEAD + chunk(b"a"), chunk(b"")],
    "the last chunk alone, then more": [HEAD + chunk(b"a"), chunk(b"") + HEAD],
    "closing, with chunks": [HEAD[:-2] + b"Connection: close\r\n\r\n" + chunk(b"a") + chunk(b"")],
}


@pytest.mark.parametrize("then_close", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("split", ["read by read", "by byte"])
@pytest.mark.parametrize("parts", ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_is_no_other_without_h11(
    autojump_clock: MockClock, parts: list[bytes], split: str, then_close: bool
) -> None:
    whole = b"".join(parts)
    if split == "by byte" and len(whole) < 1000:
        parts = [bytes([byte]) for byte in whole]
    await assert_same(parts, then_close)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    line=st.sampled_from(LINES),
    fields=st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(ENDS)), max_size=5),
    body=st.lists(st.sampled_from([chunk(b"abcde"), chunk(b"f"), chunk(b""), b"0\r\n", b"5;x\r\nghijk\r\n", b"z"])),
    cuts=st.lists(st.integers(0, 120), max_size=4),
    then_close=st.booleans(),
)
async def test_no_head_is_taken_otherwise_than_by_h11(
    autojump_clock: MockClock,
    line: bytes,
    fields: list[tuple[bytes, bytes]],
    body: list[bytes],
    cuts: list[int],
    then_close: bool,
) -> None:
    whole = line + b"\r\n" + b"".join(map(b"".join, fields)) + b"\r\n" + b"".join(body)
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    parts = [whole[start:end] for start, end in pairwise(edges) if end > start]
    await assert_same(parts, then_close)


@given(st.lists(st.sampled_from(FIELDS), max_size=6), st.binary(max_size=5))
@example([b"Transfer-Encoding: chunked"], b"")
@example([b"Transfer-Encoding: chunked", b"Connection: Keep-Alive", b"X-Empty:"], b"\r\n")
def test_what_is_plain_is_what_h11_reads(fields: list[bytes], rest: bytes) -> None:
    head = b"".join(part + b"\r\n" for part in (b"HTTP/1.1 200 OK", *fields, b""))
    plain = parse_plain_head(head + rest)
    told = {field.partition(b":")[0].strip().lower(): field.partition(b":")[2].strip().lower() for field in fields}
    if told == {b"transfer-encoding": b"chunked"} and fields == [b"Transfer-Encoding: chunked"]:
        assert plain is not None
    if plain is None:
        return
    answer, length = plain
    assert length == len(head)
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="POST", target="/", headers=[("Host", "x")]))
    http.send(h11.EndOfMessage())
    http.receive_data(head)
    event = http.next_event()
    assert isinstance(event, h11.Response)
    assert (event.status_code, event.http_version, event.reason) == (200, answer.http_version, answer.reason)
    assert [(name, value.lower()) for name, value in event.headers] == [(n, v.lower()) for n, v in answer.headers]
    assert http.their_state is h11.SEND_BODY


STREAM = chunked_head("Content-Type: text/event-stream") + chunk(b"data: [DONE]\n\n") + chunk(b"")


async def test_a_plain_answer_makes_no_h11(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("h11 was made")

    request = VendorRequest(URL, {"Content-Type": "application/json"}, b"{}")
    async with trio.open_nursery() as nursery:
        network = ScriptedNetwork(nursery, answering(STREAM))
        monkeypatch.setattr("providers.connection.Connection._h11", refuse)
        async with open_client(network) as client:
            for _ in range(3):
                await stream_answer(client, request, ChatDecoder(), lambda _: None)
    assert [len(server.requests) for server in network.servers] == [3]


async def test_urls_and_headers_are_not_mixed_up(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(STREAM))
    asked = [(query, key) for query in ("?t=1", "?t=2") for key in ("a", "b")]
    async with open_client(network) as client:
        for query, key in asked * 2:
            request = VendorRequest(URL + query, {"Authorization": key}, b'{"a":"' + key.encode() * 7 + b'"}')
            await stream_answer(client, request, ChatDecoder(), lambda _: None)
    (server,) = network.servers
    got = [(one.head.target, dict(one.head.headers)[b"authorization"]) for one in server.requests]
    assert got == [(f"/v1/chat{query}".encode(), key.encode()) for query, key in asked * 2]
    assert [one.body for one in server.requests] == [b'{"a":"' + key.encode() * 7 + b'"}' for _, key in asked * 2]


@pytest.mark.parametrize("header", [("Transfer-Encoding", "chunked"), ("Content-Length", "3")])
def test_a_framing_of_its_own_is_refused(header: tuple[str, str]) -> None:
    with pytest.raises(h11.LocalProtocolError):
        PreparedHead(h11.Request(method="POST", target="/", headers=[("Host", "x"), header]))
