"""``lumos serve --workers N`` as processes on real sockets, with a real Redis and a model server of the test's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio

from providers.recording import Recording
from server.compose import base_url
from server.serving import serve
from server.sockets import listen_tcp
from tests.harness.vendor import VendorServer
from tests.server.commands import agent_at, write_agents

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0")
LONG = 40.0


class Workers:
    """A running parent with its workers; each log line as it comes."""

    def __init__(self, process: trio.Process, vendor: VendorServer) -> None:
        self.process = process
        self.vendor = vendor
        self.url = ""
        self.output = ""
        self._grown = trio.Event()

    async def collect_output(self) -> None:
        """Gather standard error to its end."""
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.output += data.decode()
            self._grown.set()
            self._grown = trio.Event()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The whole log lines so far."""
        return [msgspec.json.decode(line) for line in self.output.splitlines(keepends=True) if line.endswith("\n")]

    def of(self, event: str) -> list[dict[str, Any]]:
        """The lines of that event."""
        return [line for line in self.lines if line["event"] == event]

    async def wait_lines(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """So many lines of that event, once they are there."""
        with trio.fail_after(LONG):  # noqa: ASYNC912 - may be there already
            while len(found := self.of(event)) < count:
                await self._grown.wait()
        return found

    def living(self) -> dict[str, int]:
        """The process ids of the workers that serve now, by name."""
        pids = {line["worker"]: line["pid"] for line in self.of("server.started")}
        return {name: pid for name, pid in pids.items() if is_running(pid)}

    async def wait_serving(self, starts: int) -> None:
        """Until workers have started so often, and are in Redis."""
        await self.wait_lines("server.started", starts)
        await self.wait_lines("redis.connected", 2 * starts)

    async def wait_exit(self) -> int:
        """The parent's exit code."""
        with trio.fail_after(LONG):
            return await self.process.wait()


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@asynccontextmanager
async def open_workers(
    directory: Path, redis_url: str, recording: Recording, *options: str, count: int = 2
) -> AsyncIterator[Workers]:
    """So many workers that serve agent ``local``; what is left of them is killed after the block."""
    vendor = VendorServer(recording)
    listeners = listen_tcp("127.0.0.1", 0)
    agents = write_agents(directory, agent_at(base_url(listeners[0])))
    environment = os.environ | {
        "TEST_KEY": "sk-test",
        "no_proxy": "*",
        "LUMOS_DATABASE_URL": f"sqlite:///{directory}/lumos.db",
    }
    arguments = [*COMMAND, "--agents", str(agents), "--redis-url", redis_url, "--workers", str(count), *options]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, vendor.app(), listeners, trio.Event())
        run: Any = partial(trio.run_process, arguments, stderr=subprocess.PIPE, check=False, cwd=ROOT, env=environment)
        workers = Workers(await nursery.start(run), vendor)
        nursery.start_soon(workers.collect_output)
        try:
            (started,) = await workers.wait_lines("workers.started")
            workers.url = f"http://127.0.0.1:{started['port']}"
            await workers.wait_serving(count)
            yield workers
        finally:
            for pid in workers.living().values():
                os.kill(pid, signal.SIGKILL)
            nursery.cancel_scope.cancel()


def new_client() -> httpx.AsyncClient:
    """A client with a new connection for each request: the kernel gives it to either worker."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(limits=limits, timeout=LONG, trust_env=False)
