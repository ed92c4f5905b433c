"""What the start of a run costs a server: CPU, time to the first words, statements, commits, hops between threads.

    .venv/bin/python -m benchmarks.start_cost [--against CHECKOUT] [--rounds 5] [--starts 200] [--burst 500]

Each checkout's `lumos serve` (whole: file database, API key, history, recall, journal) runs pinned to core 1 and asks
the benchmarks' upstream for one token; a client here asks one start after the other, each on a connection of its own.
Rounds of the checkouts are interleaved; the least and the median of the rounds count. Then one round of each under a
probe (`benchmarks.start_probe`) counts and, with `--profile`, prints where the time goes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import click
import msgspec

from benchmarks.bench.drive import RunningUpstream, running_upstream
from benchmarks.bench.launching import Order, launch_lumos
from benchmarks.bench.process import ServerProcess, free_port, running
from benchmarks.start_probe import Counts

ROOT = Path(__file__).parent.parent
SERVER_CORE, CLIENT_CORE = 1, 0
FIRST_WORDS = b'"chunk_type":"content"'
END = b"\r\n0\r\n\r\n"
WARM_UP = 50
_SERVE = "from server.cli import main; main()"
SETTLE_SECONDS = 0.5
"""So that the journal has written what the starts left behind: that is part of their cost."""


class Server(msgspec.Struct):
    """A running server and what has been measured of it: seconds for each start."""

    name: str
    process: ServerProcess
    headers: dict[str, str]
    asked: int = 0
    cpu: list[float] = []
    first_words: list[float] = []


@contextmanager
def serving(checkout: Path, upstream: RunningUpstream, probe: Path | None = None) -> Iterator[Server]:
    """That checkout's server until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        order = Order(upstream.base_url, free_port(), ["one"], Path(folder))
        launch = launch_lumos(order)
        program = ["-c", _SERVE] if probe is None else ["-m", "benchmarks.start_probe", str(probe)]
        environment = {**launch.environment, "PYTHONPATH": str(checkout)}
        command = [sys.executable, *program, *launch.command[1:]]
        run = partial(running, command, environment, port=order.port, ready_path="/health/ready")
        with run(folder=order.folder, core=SERVER_CORE) as process:
            yield Server(str(checkout), process, dict(launch.headers))


def request_for(server: Server, *, same_session: bool) -> bytes:
    """The next request: of a user of its own, or always of the same session."""
    server.asked += 1
    user = "same" if same_session else f"user-{server.asked}"
    body = msgspec.json.encode({"message": "Tell me of bench-000001:one", "user_id": user, "session_id": user})
    lines = [
        "POST /api/v1/agents/one/chat/lumosai/stream HTTP/1.1",
        f"Host: 127.0.0.1:{server.process.port}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in server.headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def start_one(server: Server, request: bytes) -> float:
    """Ask, and read to the end; seconds to the first words."""
    with socket.create_connection(("127.0.0.1", server.process.port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began, first, got = time.monotonic(), 0.0, b""
        sock.sendall(request)
        while not got.endswith(END):
            more = sock.recv(65536)
            if not more:
                raise RuntimeError(f"the answer broke off: {got[-300:]!r}")
            got += more
            if not first and FIRST_WORDS in got:
                first = time.monotonic() - began
    if not first:
        raise RuntimeError(f"no words: {got[:1000]!r}")
    return first


def run_round(server: Server, starts: int, *, same_session: bool) -> None:
    """So many starts one after the other."""
    before = server.process.cpu_seconds()
    took = [start_one(server, request_for(server, same_session=same_session)) for _ in range(starts)]
    time.sleep(SETTLE_SECONDS)
    server.cpu.append((server.process.cpu_seconds() - before) / starts)
    server.first_words.append(median(took))


def burst(server: Server, starts: int) -> str:
    """So many starts at once: what became of them, and when the last of the good ones began to speak."""
    before = server.process.cpu_seconds()
    requests = [request_for(server, same_session=False) for _ in range(starts)]
    began = time.monotonic()
    with ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.process.port))) for _ in range(starts)
        ]
        for sock, request in zip(socks, requests, strict=True):
            sock.sendall(request)
        answers = [_read_all(sock) for sock in socks]
    took = time.monotonic() - began
    cpu = server.process.cpu_seconds() - before
    good = sum(FIRST_WORDS in answer for answer in answers)
    refused = sum(b" 503 " in answer[:20] for answer in answers)
    return f"{good} answered, {refused} refused, all within {took:.2f} s, {cpu / starts * 1000:.2f} ms CPU each"


def _read_all(sock: socket.socket) -> bytes:
    got = b""
    while not got.endswith(END) and b" 503 " not in got[:20]:
        more = sock.recv(65536)
        if not more:
            break
        got += more
    return got


def count(checkout: Path, upstream: RunningUpstream, starts: int, *, profiled: int, same_session: bool) -> Counts:
    """What a probe sees of so many starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        with serving(checkout, upstream, out) as server:
            for _ in range(WARM_UP):
                start_one(server, request_for(server, same_session=same_session))
            time.sleep(SETTLE_SECONDS)
            os.kill(server.process.pid, signal.SIGUSR2 if profiled else signal.SIGUSR1)
            for _ in range(starts):
                start_one(server, request_for(server, same_session=same_session))
            time.sleep(SETTLE_SECONDS)
            os.kill(server.process.pid, signal.SIGUSR1)
            while not out.exists():
                time.sleep(0.05)
            time.sleep(0.2)
            return msgspec.json.decode(out.read_bytes(), type=Counts)


def show_counts(name: str, counts: Counts, starts: int, profiled: int) -> None:
    """Per start."""
    click.echo(f"\n{name}: per start")
    for what, number in counts.numbers.items():
        click.echo(f"  {what:<22} {number / starts:8.2f}")
    click.echo("  statements:")
    for text, number in sorted(counts.statements.items(), key=lambda item: -item[1]):
        if number >= starts / 2:
            click.echo(f"  {number / starts:6.2f}  {' '.join(text.split())[:140]}")
    if profiled:
        click.echo(counts.profile)


@click.command()
@click.option("--against", multiple=True, type=click.Path(path_type=Path), help="Another checkout; may be repeated.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--starts", default=200, show_default=True, help="In each round.")
@click.option("--burst", "at_once", default=0, help="Then so many starts at once.")
@click.option("--same-session", is_flag=True, help="All of one user in one session: history and recall find much.")
@click.option("--counts/--no-counts", default=True, show_default=True)
@click.option("--profile", is_flag=True, help="Print a profile of each checkout.")
def main(
    *,
    against: tuple[Path, ...],
    rounds: int,
    starts: int,
    at_once: int,
    same_session: bool,
    counts: bool,
    profile: bool,
) -> None:
    """Measure this checkout, and others beside it."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    checkouts = [ROOT, *against]
    with running_upstream(cpu=CLIENT_CORE) as upstream:
        with ExitStack() as stack:
            servers = [stack.enter_context(serving(checkout, upstream)) for checkout in checkouts] if rounds else []
            for server in servers:
                for _ in range(WARM_UP):
                    start_one(server, request_for(server, same_session=same_session))
            for number in range(rounds):
                for server in servers[number % len(servers) :] + servers[: number % len(servers)]:
                    run_round(server, starts, same_session=same_session)
            for server in servers:
                cpu, words = [x * 1000 for x in server.cpu], [x * 1000 for x in server.first_words]
                click.echo(
                    f"{server.name}: CPU a start {min(cpu):.2f} ms least, {median(cpu):.2f} median;"
                    f" first words {min(words):.2f} ms least, {median(words):.2f} median"
                )
                if at_once:
                    click.echo(f"  {at_once} at once: {burst(server, at_once)}")
        if counts or profile:
            for checkout in checkouts:
                seen = count(checkout, upstream, starts, profiled=profile, same_session=same_session)
                show_counts(str(checkout), seen, starts, profile)


if __name__ == "__main__":
    main()
