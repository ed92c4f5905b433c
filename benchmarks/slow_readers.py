"""Slow readers: what a server's memory does while thousands of clients do not read what they asked for.

    .venv/bin/python -m benchmarks.slow_readers [--readers 10000] [--stalled]

Starts a real ``lumos serve`` and one run with a long answer, then opens so many connections to its events, from child
processes. Each has a small receive buffer; ``--stalled`` ones never read a byte, the others read 512 bytes a second.
Reported is the server's resident memory for each reader, at its highest, beyond what it had before. The kernel's own
socket buffers are not in it. A reader that does not read is cut after the write stall limit (20 s): until then it costs
what is said here.
"""

from __future__ import annotations

import multiprocessing
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import httpx
import msgspec

from server.sockets import raise_descriptor_limit

ROOT = Path(__file__).parent.parent
READERS_A_PROCESS = 2_500
RECEIVE_BUFFER = 2_048
SIP_BYTES = 512
START_SECONDS = 60.0
WATCH_SECONDS = 10.0
TICK_SECONDS = 1.0

ANSWER_BYTES = 4 * 2**20
"""More than the kernel takes for a client that does not read: what the server keeps for it is its own to bound."""

AGENT = """
[[agent]]
id = "long"
llm_config = {{ provider = "openai_compatible", model = "m", base_url = "http://127.0.0.1:{}/v1" }}
"""


class Report(msgspec.Struct, frozen=True):
    """Bytes of resident memory.

    Attributes:
        connected: readers that got the head of a stream.
        before, most: the server's, without readers and at its highest.
    """

    connected: int
    before: int
    most: int

    @property
    def bytes_a_reader(self) -> float:
        return (self.most - self.before) / max(1, self.connected)


class LongAnswer(BaseHTTPRequestHandler):
    """A model that says a long text at once."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chunk = {"choices": [{"index": 0, "delta": {"content": "x" * 2048}}]}
        self.wfile.write(b"".join([b"data: " + msgspec.json.encode(chunk) + b"\n\n"] * (ANSWER_BYTES // 2048)))
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def model_server() -> Iterator[int]:
    """Its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), LongAnswer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def resident_bytes(pid: int) -> int:
    """Of a process, now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def lumos(readers: int, agent: str) -> Iterator[tuple[int, str]]:
    """A running server: its process id and its URL."""
    with tempfile.TemporaryDirectory() as folder:
        agents = Path(folder, "agents.toml")
        agents.write_text(agent)
        command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0"]
        options = ["--agents", str(agents), "--database-url", f"sqlite:///{folder}/lumos.db", "--drain", "0"]
        more = ["--max-connections", str(readers + 100)]
        environment = os.environ | {"no_proxy": "*"}
        with subprocess.Popen(
            [*command, *options, *more], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        ) as process:
            try:
                assert process.stderr is not None
                yield process.pid, msgspec.json.decode(process.stderr.readline())["url"]
            finally:
                process.kill()


def start_run(url: str, agent_id: str) -> str:
    """Have a run to its end; its id."""
    body = {"message": "hi", "on_disconnect": "continue"}
    address = f"{url}/api/v1/agents/{agent_id}/chat/lumosai/stream"
    with httpx.Client(trust_env=False) as client, client.stream("POST", address, json=body) as response:
        response.raise_for_status()
        assert '"chunk_type":"done"' in response.read().decode()[-1000 - 2 * ANSWER_BYTES :]
        return str(response.headers["X-Run-Id"])


def read_slowly(address: tuple[str, int], run_id: str, readers: int, stalled: bool, told: object) -> None:
    """Be many readers, in a process of their own, until killed; say how many got a stream."""
    assert hasattr(told, "send")
    raise_descriptor_limit()
    request = f"GET /api/v1/runs/{run_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with ExitStack() as open_sockets:
        sockets = []
        for _ in range(readers):
            reader = open_sockets.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            reader.settimeout(START_SECONDS)
            reader.connect(address)
            reader.sendall(request)
            sockets.append(reader)
        got = sum(reader.recv(15, socket.MSG_PEEK).startswith(b"HTTP/1.1 200") for reader in sockets)
        told.send(got)
        with selectors.DefaultSelector() as ready:
            if not stalled:
                for reader in sockets:
                    ready.register(reader, selectors.EVENT_READ)
            while True:
                time.sleep(TICK_SECONDS)
                for key, _ in ready.select(0):
                    assert isinstance(key.fileobj, socket.socket)
                    try:
                        alive = key.fileobj.recv(SIP_BYTES)
                    except OSError:
                        alive = b""
                    if not alive:
                        ready.unregister(key.fileobj)


def measure(readers: int, *, stalled: bool, watch_seconds: float = WATCH_SECONDS) -> Report:
    """Let so many readers come, and watch the server's memory for so many seconds."""
    context = multiprocessing.get_context("spawn")
    with model_server() as models, lumos(readers, AGENT.format(models)) as (pid, url), ExitStack() as processes:
        run_id = start_run(url, "long")
        parsed = httpx.URL(url)
        before = most = resident_bytes(pid)
        pipes = []
        for first in range(0, readers, READERS_A_PROCESS):
            ours, theirs = context.Pipe(duplex=False)
            count = min(READERS_A_PROCESS, readers - first)
            arguments = ((parsed.host, parsed.port), run_id, count, stalled, theirs)
            process = context.Process(target=read_slowly, args=arguments, daemon=True)
            process.start()
            processes.callback(process.kill)
            theirs.close()
            pipes.append(ours)
        connected = sum(pipe.recv() for pipe in pipes)
        until = time.monotonic() + watch_seconds
        while time.monotonic() < until:
            most = max(most, resident_bytes(pid))
            time.sleep(0.2)
        with httpx.Client(trust_env=False, timeout=30) as client:
            client.get(f"{url}/health/live").raise_for_status()
        return Report(connected, before, most)


@click.command()
@click.option("--readers", default=10_000, show_default=True)
@click.option("--stalled", is_flag=True, help="They do not read at all.")
def main(readers: int, stalled: bool) -> None:
    """Measure, and print a line."""
    raise_descriptor_limit()
    report = measure(readers, stalled=stalled)
    print(
        f"{report.connected} readers {'that never read' if stalled else 'at 512 bytes/s'}: "
        f"{report.before / 2**20:.0f} MiB before, {report.most / 2**20:.0f} MiB at most, "
        f"{report.bytes_a_reader / 1024:.1f} KiB each"
    )


if __name__ == "__main__":
    main()
