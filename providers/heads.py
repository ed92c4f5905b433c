"""Heads of HTTP/1.1 messages that need no h11: requests' that are the same but for the length, and plain answers'.

h11 takes 190 calls of functions for a request and its answer, which is a fifth of what the run and the provider take
for a start. What is not plain is left to it: a head in several reads, an interim answer, another status than 200,
another framing than chunks, a connection that is to be closed or become something else, what is malformed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import h11

_LENGTH = b"content-length"
_CODING = b"transfer-encoding"
_TYPE = b"content-type"
_COMPRESSION = b"content-encoding"

_PLAIN_HEAD = re.compile(
    rb"HTTP/1\.1 200(?: ([\t -~\x80-\xff]*))?\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)+)\r\n"
)
"""Narrower than h11's grammar: no control characters, no folded lines, no bare line ends, no other version."""

_TELLING = re.compile(
    rb"\r\n((?i:content-length|transfer-encoding|connection|upgrade|content-type|content-encoding)):"
    rb"[ \t]*([^\r]*)"
)
"""The headers that frame a body, end a connection or tell what the body is, with their values."""


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
    """The head of an answer, whoever took it apart; of a plain one the headers' names are in lower case.

    Attributes:
        media_type: of the body, in lower case and without parameters; empty if the head does not tell.
        coding: what the body is compressed by; ``identity`` if it is not.
        fields: all headers, as they came where the head is plain.
    """

    status_code: int
    media_type: str
    coding: str
    http_version: bytes
    reason: bytes
    fields: bytes | Sequence[tuple[bytes, bytes]]

    @classmethod
    def of(
        cls, status_code: int, headers: Sequence[tuple[bytes, bytes]], http_version: bytes, reason: bytes
    ) -> AnswerHead:
        """With what is told of the body looked up."""

        def told(wanted: bytes) -> str:
            return b", ".join(value for name, value in headers if name.lower() == wanted).decode("latin-1").lower()

        media_type = told(_TYPE).partition(";")[0].strip()
        return cls(status_code, media_type, told(_COMPRESSION) or "identity", http_version, reason, headers)

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """Names and values, in their order."""
        if not isinstance(self.fields, bytes):
            return self.fields
        lines = (line.partition(b":") for line in self.fields.split(b"\r\n")[:-1])
        return [(name.lower(), value.strip(b" \t")) for name, _, value in lines]


def parse_plain_head(data: bytes) -> tuple[AnswerHead, int] | None:
    """The head that ``data`` begins with, and its length; None if it is not there whole, or is not plain.

    Plain is an answer of 200 whose body comes in chunks, by the one header that says so, on a connection that lasts.
    """
    match = _PLAIN_HEAD.match(data)
    if match is None:
        return None
    media_type = b""
    codings = 0
    for name, value in _TELLING.findall(data, 0, match.end()):
        match name.lower():
            case b"content-type" if not media_type:
                media_type = value
            case b"transfer-encoding" if value.rstrip(b" \t") == b"chunked":  # written otherwise h11 changes it
                codings += 1
            case b"connection" if value.rstrip(b" \t").lower() == b"keep-alive":
                pass
            case _:
                return None
    if codings != 1:
        return None
    return AnswerHead(200, _media_type(media_type), "identity", b"1.1", match[1] or b"", match[2]), match.end()


@lru_cache(maxsize=64)
def _media_type(value: bytes) -> str:
    return value.decode("latin-1").partition(";")[0].strip().lower()


PLAIN_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
"""What h11 is to know of a plain head, once something that is not plain follows."""
