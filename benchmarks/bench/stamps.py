"""The stamp inside each content event's text, by which a client knows the event whatever frame an arm puts it into.

``~IIIII.TTTTTT.NNNNNNNNNNNNNNNNNN;``: the event's number in its answer from 0, the stream's tag, and the upstream's
CLOCK_MONOTONIC in nanoseconds at the write. The last event of an answer ends with ``!``. The width is fixed, and no
character of it is escaped in JSON or HTML, so that every arm that relays text relays the stamp.
"""

from __future__ import annotations

import re

LAST = "!"
NOT_LAST = ";"
WIDTH = 33
MARK = b"~"
"""Begins a stamp, and is in nothing else that the upstream writes."""

FIND = re.compile(rb"~(\d{5})\.(\d{6})\.(\d{18})([;!])")
"""Groups: number, tag, nanoseconds, ``;`` or ``!``."""

TO_FILL = b"######.##################"
"""Stands for tag and time in prepared bytes, until the write."""

_CHUNK_HEAD = re.compile(rb"\r\n[0-9A-Fa-f]+(?:;[^\r\n]*)?\r\n")


def prepared(number: int, *, last: bool = False) -> str:
    """A stamp whose tag and time are still to be filled in."""
    return f"~{number:05d}.{TO_FILL.decode()}{LAST if last else NOT_LAST}"


def filling(tag: int, now_ns: int) -> bytes:
    """What to put in place of ``TO_FILL``."""
    return b"%06d.%018d" % (tag, now_ns)


def stamp(number: int, tag: int, now_ns: int, *, last: bool = False) -> str:
    """A whole stamp, as for the text of a recording."""
    return f"~{number:05d}.{tag:06d}.{now_ns:018d}{LAST if last else NOT_LAST}"


def without_chunk_heads(data: bytes) -> bytes:
    """Join what HTTP's chunked coding cut in two: an arm may end a chunk in the middle of a stamp."""
    return _CHUNK_HEAD.sub(b"", data)
