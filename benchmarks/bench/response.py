"""What a client has to know of an HTTP/1.1 response: its status, and when it has ended.

Chunks are not taken apart, which would cost more than all else: a response in chunks has ended where the read bytes end
like one. Only a line that is nothing but ``0`` between CRLFs looks the same, and no server-sent event has that.
"""

from __future__ import annotations

import re

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_END_OF_CHUNKS = b"\r\n0\r\n\r\n"
_KEPT = 300
_UNKNOWN = -1


class Response:
    """One response, fed with what the connection brings."""

    __slots__ = ("_chunked", "_head", "_left", "last", "status")

    def __init__(self) -> None:
        self.status = 0
        """Known once the head is whole."""
        self.last = b""
        """At least the last 300 bytes, for telling what went wrong."""
        self._head: bytes | None = b""
        self._chunked = False
        self._left = _UNKNOWN

    def feed(self, data: bytes) -> bool:
        """Whether the response has now ended."""
        self.last = data if len(data) >= _KEPT else (self.last + data)[-_KEPT:]
        if self._head is not None:
            return self._feed_head(data)
        if self._chunked:
            return data.endswith(b"\n") and self.last.endswith(_END_OF_CHUNKS)
        return self._count_down(len(data))

    @property
    def ends_with_connection(self) -> bool:
        """Whether the connection's end is the response's."""
        return self._head is None and not self._chunked and self._left == _UNKNOWN

    def _feed_head(self, data: bytes) -> bool:
        assert self._head is not None
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return False
        head, rest = self._head[:end], self._head[end + 4 :]
        self._head = None
        status = _STATUS.match(head)
        self.status = int(status[1]) if status else 0
        self._chunked = b"\r\ntransfer-encoding: chunked" in head.lower()
        if self._chunked:
            return self.last.endswith(_END_OF_CHUNKS)
        if length := _LENGTH.search(head):
            self._left = int(length[1])
        return self._count_down(len(rest))

    def _count_down(self, more: int) -> bool:
        if self._left == _UNKNOWN:
            return False
        self._left -= more
        return self._left <= 0
