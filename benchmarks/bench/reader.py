"""One stream of the client: connects, asks, and finds the stamps in whatever comes."""

from __future__ import annotations

import errno
import os
import socket
from array import array
from collections.abc import Callable
from time import monotonic_ns

from benchmarks.bench.job import TAG, Job, Read, Stream
from benchmarks.bench.loop import READ, WRITE, Loop
from benchmarks.bench.response import Response
from benchmarks.bench.stamps import LAST, Finder, Found

_READ_BYTES = 65536
_KEPT_FOR_ERRORS = 300
_SECOND = 1_000_000_000
_LAST = LAST.encode()


class Tally:
    """What all streams of a job count together."""

    def __init__(self, window_ns: tuple[int, int]) -> None:
        self.window_ns = window_ns
        self.lateness = array("q")
        self.events = 0


class Reader:
    """Fills its ``stream`` and calls ``ended`` once; its socket is closed by then."""

    def __init__(
        self, job: Job, stream: Stream, loop: Loop, tally: Tally, ended: Callable[[Reader], None], number: int
    ) -> None:
        self._job, self.stream, self._loop, self._tally, self._ended = job, stream, loop, tally, ended
        self._plan: Read = job.reads[number % len(job.reads)]
        self._planned = self._plan != Read()
        self._stamped_by_clock = job.stamps == "clock"
        self._tag = b"%06d" % (stream.tag if self._stamped_by_clock else 0)
        self._sock: socket.socket | None = None
        self._fd = -1
        self._unsent = b""
        self._response = Response()
        self._finder = Finder()
        self._in_order = True
        self._origin_ns = 0
        self._stopped = False

    def begin(self) -> None:
        """Connect; the request follows as soon as the connection is there."""
        self._sock = sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._job.receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._job.receive_buffer)
        self._fd = sock.fileno()
        self._unsent = self._request()
        code = sock.connect_ex((self._job.host, self._job.port))
        if code not in (0, errno.EINPROGRESS):
            self._loop.watch(self._fd, 0, self._on_ready)
            self._end(os.strerror(code))
            return
        self._loop.watch(self._fd, READ | WRITE, self._on_ready)
        if code == 0:
            self._connected()

    def _request(self) -> bytes:
        job, tag = self._job, f"{self.stream.tag:06d}"
        body = job.body.replace(TAG, tag).encode()
        lines = [f"POST {job.path.replace(TAG, tag)} HTTP/1.1", f"Host: {job.host}:{job.port}"]
        lines += [f"{name}: {value.replace(TAG, tag)}" for name, value in job.headers.items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode() + body

    def _connected(self) -> None:
        self.stream.connected_ns = monotonic_ns()
        self._send()
        if self._sock is None:
            return
        plan = self._plan
        if plan.stop_after_events == 0:
            self._stop_reading()
        elif plan.stop_after_events is None and plan.close_after_s is not None:
            self._loop.call_at(monotonic_ns() + round(plan.close_after_s * _SECOND), self._close_as_planned)

    def _send(self) -> None:
        assert self._sock is not None
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            self._end(_reason(error))
            return
        if not self._unsent:
            self._loop.change(self._fd, 0 if self._stopped else READ)

    def _on_ready(self, events: int) -> None:
        if self._sock is None:
            return
        if events & WRITE and self._unsent:
            if not self.stream.connected_ns:
                code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    self._end(os.strerror(code))
                    return
                self._connected()
            else:
                self._send()
        if events & ~WRITE and self._sock is not None:
            self._receive()

    def _receive(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(_reason(error))
            return
        now = monotonic_ns()
        if not data:
            self._end("" if self._response.ends_with_connection else "connection ended early")
            return
        stream = self.stream
        if not stream.first_byte_ns:
            stream.first_byte_ns = now
        stream.bytes += len(data)
        if not stream.whole and (found := self._finder.feed(data)):
            self._count(found, now)
        if self._response.feed(data):
            self._end("")
        elif self._planned:
            self._follow_plan()

    def _count(self, found: list[Found], now: int) -> None:
        stream, tally = self.stream, self._tally
        if not stream.first_event_ns:
            stream.first_event_ns, stream.first_written_ns = now, int(found[0][2])
            self._origin_ns = 0 if self._stamped_by_clock else now - stream.first_written_ns
        expected, origin, tag = stream.events, self._origin_ns, self._tag
        begin, end = tally.window_ns
        for number, tagged, written, mark in found:
            if int(number) != expected or tagged != tag:
                self._in_order = False
            expected += 1
            written_ns = origin + int(written)
            if begin <= written_ns < end:
                tally.lateness.append(now - written_ns)
            if mark == _LAST:  # an arm may repeat the whole text after it
                stream.whole, stream.exact = True, self._in_order
                break
        tally.events += expected - stream.events
        stream.events, stream.last_event_ns = expected, now
        if not self._stamped_by_clock:
            stream.last_error_ns = now - written_ns

    def _follow_plan(self) -> None:
        plan, events = self._plan, self.stream.events
        if plan.close_after_events is not None and events >= plan.close_after_events:
            self._close_as_planned()
        elif plan.stop_after_events is not None and events >= plan.stop_after_events and not self._stopped:
            self._stop_reading()

    def _stop_reading(self) -> None:
        plan = self._plan
        self._stopped, self._planned = True, False
        self._loop.change(self._fd, WRITE if self._unsent else 0)
        now = monotonic_ns()
        if plan.resume_after_s is not None:
            self._loop.call_at(now + round(plan.resume_after_s * _SECOND), self._resume)
        if plan.close_after_s is not None:
            self._loop.call_at(now + round(plan.close_after_s * _SECOND), self._close_as_planned)

    def _resume(self) -> None:
        if self._sock is not None:
            self._stopped = False
            self._loop.change(self._fd, READ)

    def _close_as_planned(self) -> None:
        if self._sock is not None:
            self.stream.closed = True
            self._end("")

    def give_up(self) -> None:
        """Patience is over."""
        if self._sock is not None:
            self._end("unfinished")

    def _end(self, error: str) -> None:
        """Close and tell; the time is that of just before the close."""
        sock, stream = self._sock, self.stream
        assert sock is not None
        self._sock = None
        self._loop.forget(self._fd)
        stream.ended_ns = monotonic_ns()
        sock.close()
        stream.status = self._response.status
        if not error and not stream.closed:
            error = self._what_is_wrong()
        stream.error = error
        self._ended(self)

    def _what_is_wrong(self) -> str:
        """Of a response that ended as HTTP wants it."""
        stream = self.stream
        if stream.status == 200 and stream.whole:
            return "" if stream.exact else "events are missing, doubled, or another's"
        return f"status {stream.status}, not whole: {self._response.last[-_KEPT_FOR_ERRORS:].decode(errors='replace')}"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
