"""A simulated client's HTTP/1.1, by hand: it sees every byte of an answer, and how the answer ended."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress

import trio

from server.testing.memory_connection import MemoryStream

from .observations import Ending, Response, SeenFrame

MAX_HEAD_BYTES = 65_536

_STATUS = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) ")
_ID = re.compile(rb"^id: ([^\n]*)$", re.MULTILINE)


class BadAnswerError(Exception):
    """What came is no HTTP/1.1 answer; the server is at fault."""


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """A request. The ``Host`` is one that a server without keys answers."""
    fields = {"Host": "localhost", **headers}
    if body:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class AnswerReader:
    """An answer's bytes in any portions in; what they mean goes into the ``Response``. ``done`` once it is whole."""

    def __init__(self, response: Response) -> None:
        self.response = response
        self.done = False
        self._unread = bytearray()
        self._block = bytearray()
        self._left = 0
        self._next: Callable[[], bool] = self._read_head

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            BadAnswerError: they are not what can come here.
        """
        self._unread += data
        while not self.done and self._next():
            pass
        if self.done and self._unread:
            raise BadAnswerError(f"{bytes(self._unread[:100])!r} came behind the answer")

    def _read_head(self) -> bool:
        head, blank, rest = bytes(self._unread).partition(b"\r\n\r\n")
        if not blank:
            if len(head) > MAX_HEAD_BYTES:
                raise BadAnswerError("the answer's head does not end")
            return False
        status = _STATUS.match(head)
        if status is None:
            raise BadAnswerError(f"{head[:100]!r} is no answer")
        self._unread[:] = rest
        if status[1][:1] == b"1":
            return True
        fields = (line.partition(b":") for line in head.split(b"\r\n")[1:])
        headers = {name.decode("ascii").lower(): value.strip().decode("latin-1") for name, _, value in fields}
        self.response.status, self.response.headers = int(status[1]), headers
        self.response.run_id = self.response.run_id or headers.get("x-run-id") or headers.get("x-batch-id", "")
        self._begin_body(headers)
        return True

    def _begin_body(self, headers: Mapping[str, str]) -> None:
        if headers.get("transfer-encoding") == "chunked":
            self._next = self._read_size
        elif self.response.status in (204, 304):
            self.done = True
        elif "content-length" in headers:
            self._left = int(headers["content-length"])
            self._next = self._read_length
            self.done = not self._left
        else:
            raise BadAnswerError("nothing tells where the answer's body ends")

    def _read_size(self) -> bool:
        line, ended, rest = bytes(self._unread).partition(b"\r\n")
        if not ended:
            return False
        try:
            self._left = int(line, 16)
        except ValueError:
            raise BadAnswerError(f"{line[:100]!r} is no chunk's size") from None
        self._unread[:] = rest
        self._next = self._read_chunk if self._left else self._read_last_line_end
        return True

    def _read_chunk(self) -> bool:
        if self._left:
            return self._take_left()
        if not self._take_line_end():
            return False
        self._next = self._read_size
        return True

    def _read_last_line_end(self) -> bool:
        self.done = self._take_line_end()
        return self.done

    def _take_line_end(self) -> bool:
        line_end = bytes(self._unread[:2])
        if not b"\r\n".startswith(line_end):
            raise BadAnswerError(f"a chunk is followed by {line_end!r}")
        if len(line_end) == 2:
            del self._unread[:2]
        return len(line_end) == 2

    def _read_length(self) -> bool:
        took = self._take_left()
        self.done = not self._left
        return took

    def _take_left(self) -> bool:
        taken = bytes(self._unread[: self._left])
        del self._unread[: len(taken)]
        self._left -= len(taken)
        if taken:
            self._take_body(taken)
        return bool(taken)

    def _take_body(self, data: bytes) -> None:
        if not self.response.headers.get("content-type", "").startswith("text/event-stream"):
            self.response.body += data
            return
        self._block += data
        *blocks, rest = bytes(self._block).split(b"\n\n")
        self._block[:] = rest
        for block in blocks:
            if not block.startswith(b":"):
                event_id = _ID.search(block)
                text = event_id[1].decode() if event_id else ""
                self.response.frames.append(SeenFrame(trio.current_time(), text, block + b"\n\n"))


class Exchange:
    """One request on a connection of its own, and its answer, read at the client's pace.

    Whoever holds it calls ``leave``; an answer that has ended leaves by itself.

    Attributes:
        stream: None if nobody was there: then the answer is broken from the beginning.
        forgiven: the client did what may make the server break the connection, so that this is no broken answer.
    """

    def __init__(
        self, stream: MemoryStream | None, response: Response, read_bytes: int = 65_536, read_pause: float = 0.0
    ) -> None:
        self.stream = stream
        self.response = response
        self.forgiven = False
        self._reader = AnswerReader(response)
        self._read_bytes = read_bytes
        self._read_pause = read_pause
        if stream is None:
            self._end("broken")

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return not self.response.ending

    async def read(self) -> None:
        """Read once, and pause as the client does. Cancelled, it has lost nothing.

        Raises:
            BadAnswerError: as ``AnswerReader.feed``.
        """
        assert self.stream is not None
        try:
            data = await self.stream.receive_some(self._read_bytes)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self._end("left" if self.forgiven else "broken")
            return
        self._reader.feed(data)
        if self._reader.done:
            self._end("whole")
        elif self._read_pause:
            await trio.sleep(self._read_pause)

    async def read_to_end(self) -> Response:
        """Read all that comes."""
        while self.open:  # noqa: ASYNC913 - it may have ended already
            await self.read()
        return self.response

    async def half_close(self) -> None:
        """Say that nothing more will be asked here. What the server makes of it is forgiven."""
        self.forgiven = True
        if self.open and self.stream is not None:
            with suppress(trio.BrokenResourceError):
                await self.stream.send_eof()

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection, with an RST if wanted; if the answer has not ended, this is how it does."""
        if self.open:
            if reset and self.stream is not None:
                self.stream.reset()
            self._end("left")

    def give_up(self, *, leaves: bool) -> None:
        """Close the connection; unless the client ``leaves``, the answer has not ended."""
        if leaves:
            self.leave()
        elif self.stream is not None:
            self.stream.close()

    def _end(self, ending: Ending) -> None:
        self.response.ending = ending
        self.response.ended_at = trio.current_time()
        if self.stream is not None:
            self.stream.close()
