"""The stamp inside each content event's text, by which a client knows the event whatever frame an arm puts it into.

``~IIIII.TTTTTT.NNNNNNNNNNNNNNNNNN;``: the event's number in its answer from 0, the stream's tag, and the upstream's
CLOCK_MONOTONIC in nanoseconds at the write. The last event of an answer ends with ``!``. The width is fixed, and no
character of it is escaped in JSON or HTML, so that every arm that relays text relays the stamp.
"""

from __future__ import annotations

import re
from typing import TypeAlias

LAST = "!"
NOT_LAST = ";"
WIDTH = 33
MARK = b"~"
"""Begins a stamp, and is in nothing else that the upstream writes."""

Found: TypeAlias = tuple[bytes, bytes, bytes, bytes]
"""Number, tag, nanoseconds, ``;`` or ``!``."""

_FIND = re.compile(rb"~(\d{5})\.(\d{6})\.(\d{18})([;!])")

TO_FILL = b"######.##################"
"""Stands for tag and time in prepared bytes, until the write."""

_LONGEST_CUT = WIDTH + 64
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


class Finder:
    """Finds the stamps in what a stream brings, however it is cut and framed."""

    __slots__ = ("_cut",)

    def __init__(self) -> None:
        self._cut = b""

    def feed(self, data: bytes) -> list[Found]:
        """The stamps that these bytes complete. What may be the first part of one waits for the rest.

        An arm may also end a chunk of HTTP's chunked coding in the middle of a stamp.
        """
        if self._cut:
            data = self._cut + data
            self._cut = b""
        found = _FIND.findall(data)
        if data.count(MARK) != len(found):
            data = _CHUNK_HEAD.sub(b"", data)
            found = _FIND.findall(data)
            at = data.rfind(MARK)
            if at >= 0 and len(data) - at < _LONGEST_CUT and not _FIND.match(data, at):
                self._cut = data[at:]
        return found
