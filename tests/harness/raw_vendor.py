"""A model server made of bytes: each request is answered by a script of its own, good or bad HTTP alike."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import trio

from tests.harness.vendor import STREAM_HEAD, Act, chunked, text_event

DONE_EVENT = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
HELLO: tuple[Act, ...] = (STREAM_HEAD, chunked(text_event("hello")), chunked(DONE_EVENT) + LAST_CHUNK)
"""An answer as it should be: it says hello and leaves the connection open for the next request."""


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A whole answer framed by its length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class RawVendor:
    """Answers its n-th request, whatever its connection, with the n-th script, and all further ones with ``HELLO``.

    A script that closes nothing leaves its connection open for the next request; "hang" sends nothing more.
    ``requests`` holds the bytes of each request.
    """

    def __init__(self, *scripts: Iterable[Act]) -> None:
        self.requests: list[bytes] = []
        self._scripts = iter(scripts)

    def start(self, nursery: trio.Nursery, listener: trio.abc.Listener[Any]) -> None:
        """Serve in the nursery until it is cancelled; the listener takes connections from now on."""
        nursery.start_soon(trio.serve_listeners, self._serve_connection, [listener])

    async def _serve_connection(self, stream: Any) -> None:
        # A client that has gone is no fault here: what a test looks at is the client's side.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while request := await _read_request(stream):
                self.requests.append(request)
                await _play(stream, next(self._scripts, HELLO))
        await trio.aclose_forcefully(stream)


async def _read_request(stream: trio.abc.ReceiveStream) -> bytes:
    """One request whose body, if any, has a Content-Length; b"" once the client has closed."""
    request = b""
    while data := await stream.receive_some():
        request += data
        head, _, body = request.partition(b"\r\n\r\n")
        length = next((line[15:] for line in head.lower().splitlines() if line.startswith(b"content-length:")), b"0")
        if b"\r\n\r\n" in request and len(body) >= int(length):
            return request
    return b""


async def _play(stream: Any, script: Iterable[Act]) -> None:
    for act in script:
        match act:
            case bytes():
                await stream.send_all(act)
            case float():
                await trio.sleep(act)
            case "close":
                await stream.aclose()
            case "reset":
                stream.reset()
            case "hang":
                while await stream.receive_some():
                    pass
