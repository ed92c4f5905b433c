"""How deep and how branched JSON may be.

What is kept from a client is walked by code that recurses, and decoding holds the event loop.
"""

from __future__ import annotations

import re

MAX_JSON_DEPTH = 64

MAX_JSON_PARTS = 10_000
"""Arrays and objects of one body. msgspec makes 3,000 of them in a millisecond, in which nothing else runs; threads are
no help, for it keeps the interpreter's lock."""

_MAX_STRINGS = 20_000
"""Taking more strings than that out of a body would cost what is to be saved."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ALIKE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def nesting_fault(body: bytes, depth: int = MAX_JSON_DEPTH, parts: int = MAX_JSON_PARTS) -> str | None:
    """Why this body is not to be decoded; None if it may be, valid JSON or not.

    A body with few brackets costs two counts. Else strings are taken out, then every innermost pair of brackets, once
    for each level.
    """
    count = _opening(body)
    if count <= depth:
        return None
    if count > parts and _quotes(body) > 2 * _MAX_STRINGS:
        return f"has more than {parts} brackets, and too many strings to tell which of them are text"
    outside = _STRING.sub(b"", body)
    if _opening(outside) > parts:
        return f"has more than {parts} arrays and objects"
    brackets = outside.translate(_ALIKE, _NOT_BRACKETS)
    for _ in range(depth):
        if not brackets:
            return None
        brackets = brackets.replace(b"[]", b"")
    return f"nests deeper than {depth} levels" if brackets else None


def _opening(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _quotes(text: bytes) -> int:
    """Those that begin or end a string; a message that quotes JSON is full of others."""
    return text.count(b'"') - text.count(b'\\"') + text.count(b'\\\\"')
