"""Heads of HTTP/1.1 messages that need no h11: requests' that are the same but for the length, and plain answers'.

h11 takes 190 calls of functions for a request and its answer, which is a fifth of what the run and the provider take
for a start. What is not plain is left to it: a head in several reads, an interim answer, another status than 200,
another framing than chunks, a connection that is to be closed or become something else, what is malformed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import h11

_LENGTH = b"content-length"
_CODING = b"transfer-encoding"

_PLAIN_HEAD = re.compile(
    rb"HTTP/1\.1 200(?: ([\t -~\x80-\xff]*))?\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)+)\r\n"
)
"""Narrower than h11's grammar: no control characters, no folded lines, no bare line ends, no other version."""


class PreparedHead:
    """The head of POSTs that differ in their bodies alone: checked by h11 and put together once.

    Attributes:
        head: without a length, as h11 and a proxy are told of it.

    Raises:
        h11.LocalProtocolError: the body is to be framed otherwise than by its length.
    """

    __slots__ = ("_begin", "head")

    def __init__(self, head: h11.Request) -> None:
        if head.method != b"POST" or any(name in (_LENGTH, _CODING) for name, _ in head.headers):
            raise h11.LocalProtocolError("only a POST without length and coding can be prepared")
        self.head = head
        self._begin = (h11.Connection(h11.CLIENT).send(head) or b"").removesuffix(b"\r\n")

    def with_content(self, content: bytes) -> bytes:
        """The whole request."""
        return b"%sContent-Length: %d\r\n\r\n%s" % (self._begin, len(content), content)

    def with_length(self, content: bytes) -> h11.Request:
        """The head for this body, to be changed by a proxy or written by h11."""
        headers = [*self.head.headers.raw_items(), (b"Content-Length", b"%d" % len(content))]
        return h11.Request(method=self.head.method, target=self.head.target, headers=headers)


class AnswerHead(NamedTuple):
    """The head of an answer, whoever took it apart; of a plain one the headers' names are in lower case."""

    status_code: int
    headers: Sequence[tuple[bytes, bytes]]
    http_version: bytes
    reason: bytes


def parse_plain_head(data: bytes) -> tuple[AnswerHead, int] | None:
    """The head that ``data`` begins with, and its length; None if it is not there whole, or is not plain.

    Plain is an answer of 200 whose body comes in chunks, by the one header that says so, on a connection that lasts.
    """
    match = _PLAIN_HEAD.match(data)
    if match is None:
        return None
    headers: list[tuple[bytes, bytes]] = []
    codings = 0
    for line in match[2].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if name == _CODING and value.lower() == b"chunked":
            codings += 1
        elif name in _TELLING and not (name == b"connection" and value.lower() == b"keep-alive"):
            return None
        headers.append((name, value))
    return (AnswerHead(200, headers, b"1.1", match[1] or b""), match.end()) if codings == 1 else None


_TELLING = frozenset({_LENGTH, _CODING, b"connection", b"upgrade"})
"""What frames a body or ends a connection: of these, only what is expected is plain."""
