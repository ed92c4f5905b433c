"""The model that all arms ask: OpenAI chat completions from prepared bytes, at scripted times.

    python -m benchmarks.bench.upstream --port-file F

The user's message says who asks and what for: ``bench-000012:paced-20x100`` is stream 12 (the last such word in the
body counts); without ``:name``, the request's ``model`` names the script. Without the word, the stream gets a number of
the upstream's own. What is due at once is one write; a connection that takes no more gets what has become due meanwhile
once it does, stamped then.
"""

from __future__ import annotations

import errno
import re
import socket
import time
from array import array
from bisect import bisect_right
from pathlib import Path
from time import monotonic_ns

import click
import msgspec

from benchmarks.bench.histogram import Histogram
from benchmarks.bench.loop import READ, WRITE, Loop, prepare_process
from benchmarks.bench.scripts import EVENTS, Script, script_of
from benchmarks.bench.stamps import TO_FILL, filling
from benchmarks.bench.upstream_log import Ending, OpenNow, Served, Stats

_ASKED = re.compile(rb"bench-(\d{6})(?::([a-z0-9-]+))?")
_MODEL = re.compile(rb'"model":\s*"([^"]+)"')
_STREAMED = re.compile(rb'"stream":\s*true')
_TOOL_ANSWER = re.compile(rb'"role":\s*"tool"')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_READ_BYTES = 65536
_EVENTS_AT_ONCE = 256
_BACKLOG = 4096
_OWN_TAGS = 900_000


class Upstream:
    """The listener and what is counted; connections live until their client or ``close`` ends them."""

    def __init__(self, loop: Loop, *, slow_seconds: float = 0) -> None:
        self.loop = loop
        self.log: list[Served] = []
        self.connections: dict[int, Connection] = {}
        self.slow_seconds = slow_seconds
        self._lateness = Histogram()
        self.late_ns, self.late_counts = array("q"), array("q")
        self.events = self.sends = self.refused = self.own_tags = self.open_answers = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        loop.watch(self.listener.fileno(), READ, self._accept)

    def reset(self) -> None:
        """Count from here on; open answers go on and stay in the log."""
        self.log = [served for served in self.log if served.ending == "open"]
        self._lateness = Histogram()
        self.late_ns, self.late_counts = array("q"), array("q")
        self.events = self.sends = self.refused = 0

    def open_now(self) -> OpenNow:
        """Connections, and answers that have not ended."""
        return OpenNow(len(self.connections), self.open_answers)

    def stats(self) -> Stats:
        """What has been counted; it takes a microsecond for each write since the last time."""
        for late_ns, count in zip(self.late_ns, self.late_counts, strict=True):
            self._lateness.add(late_ns, count)
        self.late_ns, self.late_counts = array("q"), array("q")
        open_now = self.open_now()
        return Stats(
            connections=open_now.connections,
            open_answers=open_now.answers,
            requests=len(self.log),
            events=self.events,
            sends=self.sends,
            lateness=self._lateness,
            refused=self.refused,
        )

    def close(self) -> None:
        """End all connections and the listener."""
        for connection in list(self.connections.values()):
            connection.close("fin")
        self.loop.forget(self.listener.fileno())
        self.listener.close()

    def _accept(self, _events: int) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                raise
            self.connections[sock.fileno()] = Connection(self, sock)


class Connection:
    """One client connection: requests one after the other, each answered by a script."""

    __slots__ = ("_answer", "_got", "_unsent", "_up", "fd", "sock")

    def __init__(self, up: Upstream, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._up, self.sock, self.fd = up, sock, sock.fileno()
        self._got = b""
        self._unsent: memoryview | None = None
        self._answer: Answer | None = None
        up.loop.watch(self.fd, READ, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if events & ~WRITE:
            try:
                data = self.sock.recv(_READ_BYTES)
            except BlockingIOError:
                pass
            except OSError:
                self.close("reset")
                return
            else:
                if not data:
                    self.close("fin")
                    return
                self._got += data
                self._requests()
        if events & WRITE and self._unsent is not None:
            self._flush()

    def _requests(self) -> None:
        """Answer the request that is complete, unless one is being answered."""
        head_end = self._got.find(b"\r\n\r\n")
        if self._answer is not None or head_end < 0:
            return
        length = _LENGTH.search(self._got, 0, head_end)
        end = head_end + 4 + (int(length[1]) if length else 0)
        if len(self._got) < end:
            return
        line = self._got[: self._got.find(b"\r\n")]
        body, self._got = self._got[head_end + 4 : end], self._got[end:]
        if line.startswith(b"POST ") and b"/chat/completions" in line:
            self._ask(body)
        else:
            self._control(line)

    def _control(self, line: bytes) -> None:
        method_and_path = line.rsplit(b" ", 1)[0]
        up = self._up
        match method_and_path:
            case b"GET /open":
                self._reply(msgspec.json.encode(up.open_now()))
            case b"GET /stats":
                self._reply(msgspec.json.encode(up.stats()))
            case b"GET /log":
                self._reply(msgspec.json.encode(up.log))
            case b"POST /reset":
                up.reset()
                self._reply(b"{}")
            case b"GET /v1/models":
                self._reply(
                    b'{"object":"list","data":[{"id":"bench","object":"model","created":0,"owned_by":"bench"}]}'
                )
            case _:
                up.refused += 1
                self._reply(b'{"error":{"message":"no such path"}}', b"404 Not Found")

    def _ask(self, body: bytes) -> None:
        received_ns = monotonic_ns()
        up = self._up
        asked = _ASKED.findall(body)
        model = _MODEL.search(body)
        if asked:
            tag, name = int(asked[-1][0]), asked[-1][1]
        else:
            up.own_tags += 1
            tag, name = _OWN_TAGS + up.own_tags, b""
        name = name or (model[1] if model else b"").rpartition(b"/")[2]
        try:
            script = script_of(name.decode(), tag, tools_answered=_TOOL_ANSWER.search(body) is not None)
        except ValueError as error:
            up.refused += 1
            self._reply(msgspec.json.encode({"error": {"message": str(error)}}), b"404 Not Found")
            return
        if not _STREAMED.search(body):
            self._reply(_WHOLE)
            return
        served = Served(tag, name.decode(), received_ns)
        up.log.append(served)
        up.open_answers += 1
        self._answer = Answer(self, up, script, served)
        self._answer.advance()

    def _reply(self, content: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.send(head % (status, len(content)) + content)

    def send(self, data: bytes) -> bool:
        """Write now; False once the socket is full: what is left is written when it takes more. Closes on errors."""
        self._up.sends += 1
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close("reset")
            return False
        if sent == len(data):
            return True
        self._unsent = memoryview(data)[sent:]
        self._up.loop.change(self.fd, READ | WRITE)
        return False

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, None
        assert unsent is not None
        if self.send(bytes(unsent)):
            self._up.loop.change(self.fd, READ)
            if self._answer is not None:
                self._answer.advance(waited=True)

    def answered(self) -> None:
        """The answer is written as far as it goes: the next request may come."""
        self._answer = None
        if self._got:
            self._up.loop.call_at(monotonic_ns(), self._requests)

    def close(self, ending: Ending) -> None:
        """The client has gone, or is to go."""
        if self.fd not in self._up.connections:
            return
        now = monotonic_ns()
        del self._up.connections[self.fd]
        self._up.loop.forget(self.fd)
        self.sock.close()
        if self._answer is not None:
            self._answer.end(ending, now)
            self._answer = None


class Answer:
    """One script on its way down one connection."""

    __slots__ = ("_connection", "_dues", "_next", "_opened", "_origin_ns", "_script", "_served", "_up", "_whole")

    def __init__(self, connection: Connection, up: Upstream, script: Script, served: Served) -> None:
        self._connection, self._up, self._script, self._served = connection, up, script, served
        self._dues = script.dues
        self._origin_ns = served.received_ns + script.shift_ns(served.tag)
        self._next = 0
        self._opened = self._whole = False

    def advance(self, *, waited: bool = False) -> None:
        """Write all that is due, in one piece, and come back when more is; ``waited``: for a full socket."""
        script, served, first = self._script, self._served, self._next
        if served.ending != "open":
            return
        if self._up.slow_seconds:
            time.sleep(self._up.slow_seconds)
        now = monotonic_ns()
        data = b""
        if not self._opened and now - served.received_ns >= script.opening_ns:
            data = script.opening
            self._opened = True
        if self._opened and not self._whole:
            limit = min(script.count, first + _EVENTS_AT_ONCE)
            end = bisect_right(self._dues, now - self._origin_ns, first, limit)
            if end > first or not script.count:
                data += self._events(first, end, now, waited)
        if data and not self._connection.send(data):
            return
        if self._whole:
            self.end("whole", monotonic_ns())
            self._connection.answered()
        else:
            self._come_back(now)

    def _events(self, first: int, end: int, now: int, waited: bool) -> bytes:
        up, script, served = self._up, self._script, self._served
        if end > first:
            if not waited and (script.timed or not first):
                up.late_ns.append(now - self._origin_ns - self._dues[first])
                up.late_counts.append(end - first)
            up.events += end - first
            served.events = self._next = end
            served.first_write_ns = served.first_write_ns or now
        self._whole = end == script.count and script.ending is not None
        if self._whole:
            data = EVENTS.between(first, max(first, end - 1)) + (script.ending or b"")
        else:
            data = EVENTS.between(first, end)
        return data.replace(TO_FILL, filling(served.tag, now))

    def _come_back(self, now: int) -> None:
        if not self._opened:
            due = self._served.received_ns + self._script.opening_ns
        elif self._next < self._script.count:
            due = self._origin_ns + self._dues[self._next]
        else:
            return
        self._up.loop.call_at(max(due, now), self.advance)

    def end(self, ending: Ending, now: int) -> None:
        """Note how it ended."""
        self._served.ending, self._served.ended_ns = ending, now
        self._up.open_answers -= 1


_WHOLE = (
    b'{"id":"chatcmpl-bench","object":"chat.completion","created":1774800000,"model":"gpt-4o-2024-08-06","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"ok"},"logprobs":null,"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":20,"completion_tokens":1,"total_tokens":21}}'
)


@click.command()
@click.option("--port-file", required=True, type=click.Path(path_type=Path), help="The port is written into it.")
@click.option("--cpu", type=int, help="Run on this core alone, before others if allowed.")
@click.option("--slow-ms", default=0.0, help="Wait so long before each write: to see that calibration notices.")
def main(port_file: Path, cpu: int | None, slow_ms: float) -> None:
    """Answer until terminated."""
    prepare_process(cpu)
    loop = Loop()
    upstream = Upstream(loop, slow_seconds=slow_ms / 1000)
    EVENTS.at_least(2000)
    unfinished = port_file.with_suffix(".new")
    unfinished.write_text(str(upstream.port))
    unfinished.rename(port_file)
    loop.run()


if __name__ == "__main__":
    main()
