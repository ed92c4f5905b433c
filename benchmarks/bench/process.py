"""Runs one server as a process of its own, pinned to a core, and reads from ``/proc`` what it costs."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

START_SECONDS = 120.0
STOP_SECONDS = 5.0
KILL_SECONDS = 5.0
POLL_SECONDS = 0.001
"""Between two looks at a server that starts: what ``start_seconds`` may be too high by."""

LONGEST_LINE = 300
"""Characters of a server's last words that an error shows of each line."""

_HOST = "127.0.0.1"
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ServerFailedError(RuntimeError):
    """A server ended before it was ready, or was not ready in time; the text ends with its last lines."""


class Cost(msgspec.Struct, frozen=True):
    """What the processes of a server hold, now.

    Attributes:
        cpu_seconds: user and system time since they began, children that have ended included.
        pss_bytes: memory; a page that n processes share counts 1/n.
        descriptors: open files and sockets.
        processes: how many there are.
    """

    cpu_seconds: float
    pss_bytes: int
    descriptors: int
    processes: int


class Stopped(msgspec.Struct, frozen=True):
    """How a server ended.

    Attributes:
        seconds: from the SIGTERM on.
        returncode: of its first process, as ``subprocess`` has it.
        killed: how many of its processes did not end by themselves.
    """

    seconds: float
    returncode: int
    killed: int


class ServerProcess:
    """A server that was started; ``running`` makes one and ends it.

    Attributes:
        pid: of its first process, whose session all its processes are in.
        port: where it listens, on 127.0.0.1.
        log: the file with what it writes to its standard output and error.
        start_seconds: from exec to the first 200.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, start_seconds: float) -> None:
        self._process = process
        self.pid = process.pid
        self.port = port
        self.log = log
        self.start_seconds = start_seconds

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process.poll() is None

    def cost(self) -> Cost:
        """Read it all; of processes that end meanwhile, nothing."""
        pids = session_processes(self.pid)
        return Cost(sum(map(cpu_seconds, pids)), sum(map(pss_bytes, pids)), sum(map(open_descriptors, pids)), len(pids))

    def cpu_seconds(self) -> float:
        """As ``Cost`` has it, without the price of reading memory maps."""
        return sum(map(cpu_seconds, session_processes(self.pid)))

    def stop(self, seconds: float = STOP_SECONDS) -> Stopped:
        """SIGTERM, and SIGKILL for whoever is there after so many seconds. May be called again."""
        began = time.monotonic()
        if self.alive:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        left = session_processes(self.pid)
        for pid in left:
            _kill(pid)
        returncode = self._process.wait(KILL_SECONDS)
        return Stopped(time.monotonic() - began, returncode, len(left))


@contextmanager
def _pid_file(pid: int) -> Iterator[int]:
    """A descriptor that stands for a process, even if its number is given to another."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _kill(pid: int) -> None:
    """End a process, a child of ours or not, and wait until it has ended, so many seconds at most."""
    with suppress(ProcessLookupError), _pid_file(pid) as file:
        signal.pidfd_send_signal(file, signal.SIGKILL)
        ended = select.poll()
        ended.register(file, select.POLLIN)
        ended.poll(KILL_SECONDS * 1000)


@contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    port: int,
    ready_path: str,
    folder: Path,
    core: int | None = None,
    first: bool = False,
    start_seconds: float = START_SECONDS,
) -> Iterator[ServerProcess]:
    """The server, ready, until the end of the block.

    Args:
        command: what to start; it is to listen on 127.0.0.1.
        environment: all that it sees of one.
        port: where it will listen.
        ready_path: what answers 200 once it is ready; "" if taking connections is all that there is to see.
        folder: is there already; the server runs in it and its log, ``log``, is put there.
        core: the CPU that it is bound to; None for all.
        first: it runs before whatever else there is, if the system allows that.
        start_seconds: what it may take to be ready.

    Raises:
        ServerFailedError: it did not get ready.
    """
    log = folder / "log"
    began = time.monotonic()
    with log.open("ab") as output, on_core(core), before_others(first):
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = ServerProcess(process, port, log, 0.0)
    try:
        _wait_ready(server, ready_path, began + start_seconds)
        server.start_seconds = time.monotonic() - began
        yield server
    finally:
        server.stop()


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Bind this thread to a CPU for the length of the block: a process that it starts inherits that before its exec."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def before_others(first: bool) -> Iterator[None]:
    """With ``first``, have this thread run before others for the length of the block, inherited as by ``on_core``."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        with suppress(PermissionError):
            if first:
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
        yield
    finally:
        os.sched_setscheduler(0, *before)


def free_port() -> int:
    """A port that nobody listens on. Somebody may take it before it is used: such a start fails and says so."""
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_ready(server: ServerProcess, path: str, deadline: float) -> None:
    while not _answers(server.port, path, deadline):
        if not server.alive or time.monotonic() > deadline:
            lines = [line[:LONGEST_LINE] for line in server.log.read_text(errors="replace").splitlines()[-20:]]
            what = "ended" if not server.alive else "was not ready in time"
            raise ServerFailedError("\n".join([f"the server {what}; its last lines:", *lines]))
        time.sleep(POLL_SECONDS)


def _answers(port: int, path: str, deadline: float) -> bool:
    """Whether a GET is answered with 200, or without a path, a connection taken; waits as long as it may for that."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with suppress(OSError), socket.create_connection((_HOST, port), max(0.1, deadline - time.monotonic())) as client:
        if not path:
            return True
        client.sendall(request.encode())
        return client.recv(16).startswith(b"HTTP/1.1 200")
    return False


def session_processes(session: int) -> list[int]:
    """All live processes of a session, orphans included, the leader first."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return sorted(found, key=lambda pid: (pid != session, pid))


def cpu_seconds(pid: int) -> float:
    """A process's user and system time, to the nanosecond, and its ended children's, to the tick; 0 if it has ended.

    The process's own is read from its CPU clock: what ``/proc/PID/stat`` shows is the same, cut to ticks of 10 ms.
    """
    fields = _stat(pid)
    if not fields:
        return 0.0
    children = (int(fields[13]) + int(fields[14])) / _TICKS_PER_SECOND
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2) + children  # clock_getcpuclockid(3) in Linux
    return 0.0


def pss_bytes(pid: int) -> int:
    """A process's proportional share of the memory that it maps; 0 if it has ended."""
    with suppress(ProcessLookupError, FileNotFoundError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def open_descriptors(pid: int) -> int:
    """How many a process has open; 0 if it has ended."""
    with suppress(ProcessLookupError, FileNotFoundError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the state (the third) on; none if the process has ended."""
    with suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
