"""Start the upstream and the client as processes of their own, and ask them."""

from __future__ import annotations

import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.bench.job import Job, Outcome, Progress
from benchmarks.bench.upstream_log import OpenNow, Served, Stats

ROOT = Path(__file__).parents[2]
START_SECONDS = 20
_ANSWER_SECONDS = 30


class RunningUpstream:
    """An upstream process; what it tells."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid, self.port = pid, port
        self.base_url = f"http://127.0.0.1:{port}/v1"

    def open_now(self) -> OpenNow:
        """What is open; cheap enough to ask during a round."""
        return msgspec.json.decode(self._ask("GET", "/open"), type=OpenNow)

    def stats(self) -> Stats:
        """Counts and lateness since the last reset."""
        return msgspec.json.decode(self._ask("GET", "/stats"), type=Stats)

    def log(self) -> list[Served]:
        """All answers since the last reset, and those that were open then."""
        return msgspec.json.decode(self._ask("GET", "/log"), type=list[Served])

    def reset(self) -> None:
        """Start counting anew."""
        self._ask("POST", "/reset")

    def _ask(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request(method, path)
            return connection.getresponse().read()
        finally:
            connection.close()


@contextmanager
def running_upstream(*, cpu: int | None = None, slow_ms: float = 0) -> Iterator[RunningUpstream]:
    """An upstream that ends with the block. Raises ``RuntimeError`` if it does not start."""
    with tempfile.TemporaryDirectory() as directory:
        port_file = Path(directory) / "port"
        command = [sys.executable, "-m", "benchmarks.bench.upstream", "--port-file", str(port_file)]
        command += [f"--slow-ms={slow_ms}", *_on(cpu)]
        with subprocess.Popen(command, cwd=ROOT) as process:
            try:
                yield RunningUpstream(process.pid, _port(process, port_file))
            finally:
                process.terminate()


def _port(process: subprocess.Popen[bytes], port_file: Path) -> int:
    deadline = time.monotonic() + START_SECONDS
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the upstream did not start")
        time.sleep(0.005)
    return int(port_file.read_text())


def run_client(
    job: Job, *, cpu: int | None = None, on_progress: Callable[[Progress], None] = lambda _: None
) -> Outcome:
    """Do the job in a process of its own; it ends with the call. Raises ``RuntimeError`` if it fails.

    ``on_progress`` is called twice a second, in the caller's thread.
    """
    command = [sys.executable, "-m", "benchmarks.bench.client", *_on(cpu)]
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(msgspec.json.encode(job))
        stdin.seek(0)
        said = []
        with subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    if line.startswith(b"{"):
                        on_progress(msgspec.json.decode(line, type=Progress))
                    else:
                        said.append(line)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(f"the client failed: {b''.join(said).decode(errors='replace')}")
        stdout.seek(0)
        return msgspec.json.decode(stdout.read(), type=Outcome)


def _on(cpu: int | None) -> list[str]:
    return [] if cpu is None else [f"--cpu={cpu}"]
