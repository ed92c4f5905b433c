"""Server-sent events: bytes in any portions in, whole events out.

The rules are those of the WHATWG HTML standard, section "Interpreting an event stream"
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation). Three things are ours:
``data`` stays bytes, sizes are bounded, and an event is handed out as soon as the CR or LF of its blank line is there.
"""

from __future__ import annotations

import msgspec

MAX_EVENT_BYTES = 1 << 20
"""The default bound on one line and on the data of one event: 1 MiB."""

_BOM = b"\xef\xbb\xbf"

# int() of a long digit string raises ValueError (sys.set_int_max_str_digits), and 10**15 ms are thirty thousand years.
_MAX_RETRY_DIGITS = 15


class ServerSentEvent(msgspec.Struct, frozen=True, gc=False):
    """One dispatched event.

    ``data`` holds its ``data`` lines joined by LF, not decoded: a JSON decoder takes bytes and refuses invalid UTF-8,
    which decoding by the standard would turn into U+FFFD unseen. ``event`` is the event's type. ``id`` is the last
    event id as of this event; it sticks until another one comes.
    """

    data: bytes
    event: str = "message"
    id: str = ""


class EventTooLargeError(Exception):
    """The sender's fault: a line, or the data of one event, is larger than ``limit`` bytes.

    ``events`` are those that the same chunk had completed before; ``feed`` could not return them.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(f"a server-sent event is larger than {limit} bytes")
        self.limit = limit
        self.events: tuple[ServerSentEvent, ...] = ()


class SSEParser:
    """An incremental parser for one response body; a reconnect takes a new one.

    The time it takes is linear in the bytes fed, however they are cut. It keeps no more than one unfinished line and
    the data of one event, each bounded by ``max_event_bytes``. A last block without its blank line is never handed
    out, so there is nothing to call at the end of the body.

    Attributes:
        last_event_id: the id to send as ``Last-Event-ID`` on a reconnect; empty means none. An id counts once its
            block ended, also if that block had no data and therefore dispatched nothing.
        retry: milliseconds to wait before a reconnect, as the server last asked; None if it did not.
    """

    __slots__ = (
        *("_after_cr", "_data", "_data_bytes", "_event", "_id", "_limit", "_may_be_bom", "_too_large"),
        *("_unfinished_line", "last_event_id", "retry"),
    )

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        """Bound a line (without its end) and an event's joined data to ``max_event_bytes`` each.

        Raises:
            ValueError: ``max_event_bytes`` is below 1.
        """
        if max_event_bytes < 1:
            raise ValueError(f"max_event_bytes must be at least 1, not {max_event_bytes}")
        self.last_event_id = ""
        self.retry: int | None = None
        self._limit = max_event_bytes
        self._too_large = False
        self._may_be_bom: bytes | None = b""
        self._after_cr = False
        self._unfinished_line: bytearray | None = None
        self._data: list[bytes] | None = None
        self._data_bytes = 0
        self._event = ""
        self._id = ""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes of the body and return the events that they complete, oldest first.

        Raises:
            EventTooLargeError: a line or an event outgrew the bound. The parser is spent then: every further call
                raises too.
        """
        if self._too_large:
            raise EventTooLargeError(self._limit)
        if (plain := self._plain_events(chunk)) is not None:
            return plain
        lines = self._split(chunk if self._may_be_bom is None else self._strip_bom(chunk))
        rest = lines.pop()
        if lines and self._unfinished_line:
            lines[0] = bytes(self._unfinished_line + lines[0])
            self._unfinished_line = None
        events: list[ServerSentEvent] = []
        try:
            self._take_lines(lines, events)
            if rest:
                self._hold(rest)
        except EventTooLargeError as error:
            error.events = tuple(events)
            self._too_large = True
            self._unfinished_line = self._data = None
            raise
        return events

    def _hold(self, rest: bytes) -> None:
        if self._unfinished_line is None:
            self._unfinished_line = bytearray()
        self._unfinished_line += rest
        if len(self._unfinished_line) > self._limit:
            raise EventTooLargeError(self._limit)

    def _plain_events(self, chunk: bytes) -> list[ServerSentEvent] | None:
        """The events of a chunk that is nothing but whole ones of one ``data`` line each, as models' are; else None."""
        if self._unfinished_line or self._data or self._event or self._may_be_bom:
            return None
        if not (chunk.startswith(b"data: ") and chunk.endswith(b"\n\n")) or b"\r" in chunk or len(chunk) > self._limit:
            return None
        values = chunk[6:-2].split(b"\n\ndata: ")
        if chunk.count(b"\n") != 2 * len(values):
            return None
        self._after_cr = False
        self._may_be_bom = None
        self.last_event_id = self._id
        if len(values) == 1:
            return [ServerSentEvent(values[0], "message", self._id)]
        return [ServerSentEvent(value, "message", self._id) for value in values]

    def _strip_bom(self, chunk: bytes) -> bytes:
        """Hold the body's first bytes back until they are a BOM, which is dropped, or cannot become one."""
        head = (self._may_be_bom or b"") + chunk
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._may_be_bom = head
            return b""
        self._may_be_bom = None
        return head.removeprefix(_BOM)

    def _split(self, chunk: bytes) -> list[bytes]:
        """Split at line ends; the last part is the beginning of a line, often empty."""
        if not chunk:
            return [b""]
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        # bytes.splitlines knows CR, LF and CRLF alone, as the standard does; str.splitlines splits at U+2028 and more.
        lines = chunk.splitlines()
        if not lines or chunk.endswith((b"\n", b"\r")):
            lines.append(b"")
        return lines

    def _take_lines(self, lines: list[bytes], events: list[ServerSentEvent]) -> None:
        """Work through whole lines and add to ``events`` what they complete."""
        for line in lines:
            if len(line) > self._limit:
                raise EventTooLargeError(self._limit)
            if line.startswith(b"data: "):
                self._add_data(line[6:])
            elif line:
                self._take_field(line)
            else:
                self._end_block(events)

    def _take_field(self, line: bytes) -> None:
        """Take one non-empty line. A comment has an empty field name and goes the way of all unknown ones."""
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match name:
            case b"data":
                self._add_data(value)
            case b"event":
                self._event = value.decode("utf-8", "replace")
            case b"id" if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
            case b"retry" if value.isdigit() and len(value) <= _MAX_RETRY_DIGITS:
                self.retry = int(value)

    def _add_data(self, value: bytes) -> None:
        joined_bytes = self._data_bytes + len(value)
        if joined_bytes > self._limit:
            raise EventTooLargeError(self._limit)
        if self._data is None:
            self._data = [value]
        else:
            self._data.append(value)
        self._data_bytes = joined_bytes + 1

    def _end_block(self, events: list[ServerSentEvent]) -> None:
        """Dispatch at a blank line if there was a ``data`` line; the id is committed and the type reset either way."""
        self.last_event_id = self._id
        if self._data is not None:
            data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            events.append(ServerSentEvent(data, self._event or "message", self._id))
            self._data = None
            self._data_bytes = 0
        self._event = ""
