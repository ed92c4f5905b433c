"""A model server made of bytes: what comes is read as requests, and each is answered by a script, good or bad HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import trio


@dataclass(frozen=True)
class Until:
    """Wait until so many seconds after the request; waits that are counted from there do not add up their errors."""

    seconds: float


Act: TypeAlias = bytes | float | Until | Literal["close", "reset", "break", "hang"]
"""One act of a script: bytes to send, seconds to wait, or an end.

"reset" takes back what the client has not read, "break" lets it read that before it meets the reset; "hang" says
nothing more until the client goes.
"""

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A whole answer framed by its length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def read_request(stream: trio.abc.ReceiveStream) -> bytes:
    """One request whose body, if any, has a Content-Length; b"" once the client has closed."""
    request = b""
    while data := await stream.receive_some():
        request += data
        head, _, body = request.partition(b"\r\n\r\n")
        length = next((line[15:] for line in head.lower().splitlines() if line.startswith(b"content-length:")), b"0")
        if b"\r\n\r\n" in request and len(body) >= int(length):
            return request
    return b""


async def play(stream: Any, script: Iterable[Act]) -> None:
    """Act the script on the connection, its request having come now. Raises as the stream does."""
    started_at = trio.current_time()
    for act in script:
        match act:
            case bytes():
                await stream.send_all(act)
            case float():
                await trio.sleep(act)
            case Until(seconds):
                await trio.sleep_until(started_at + seconds)
            case "close":
                await stream.aclose()
            case "reset":
                stream.reset()
            case "break":
                stream.connection.cut(reset=True)
            case "hang":
                while await stream.receive_some():
                    pass
