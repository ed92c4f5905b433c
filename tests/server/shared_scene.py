"""Workers that share runs through a real Redis, all in the test's own process; a run says what the test tells it to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from engine import Emit, Error, FinishPiece, LogEntry, Message, ModelRequest, Owner, Run, RunSpec, RunSupervisor
from engine.log import EventLog
from server.log_followers import LogFollowers
from server.principal import LOCAL_USER
from server.run_directory import LocalRun
from server.run_uploads import SharedLimits
from server.shared_log import SharedLog
from server.shared_run import SharedRun
from tests.engine.scripted import ProgrammedProvider, text
from tests.harness.redis import RedisServer

LEASE = 0.6
LONG = 10.0
OWNER = Owner(tenant_id=LOCAL_USER.tenant_id, user_id=LOCAL_USER.user_id, session_id="session")


class Script:
    """What the model of a run says, as the test has it said."""

    def __init__(self) -> None:
        self.send, self._told = trio.open_memory_channel[str | None](1000)

    def say(self, *words: str) -> None:
        """Say these words, each in a read of its own."""
        for word in words:
            self.send.send_nowait(word)

    def end(self) -> None:
        """The answer is whole."""
        self.send.send_nowait(None)

    async def stream(self, emit: Emit) -> None:
        async for word in self._told:
            if word is None:
                emit((FinishPiece("stop"),))
                return
            emit(text(word))


class Worker:
    """One worker: its runs and its side of the shared log."""

    def __init__(self, nursery: trio.Nursery, redis: RedisServer, name: str, limits: SharedLimits) -> None:
        self._nursery = nursery
        self.shared = SharedLog(redis.url, name, limits)
        self.supervisor = RunSupervisor(nursery, LogFollowers(self.shared))
        nursery.start_soon(self.shared.run, self.supervisor)

    def start(self, script: Script, grace: float = 60.0) -> Run:
        """Start a run that says what the script tells."""
        spec = RunSpec(
            agent_id="agent",
            provider=ProgrammedProvider(script.stream),
            request=ModelRequest((Message("user", "?"),), "m"),
            owner=OWNER,
            resume_grace=grace,
        )
        return self.supervisor.start(spec)

    async def find(self, run_id: str) -> SharedRun:
        """Another worker's run, once Redis knows of it."""
        await eventually(lambda: self.shared.find(run_id))
        found = await self.shared.find(run_id)
        assert found is not None
        return found

    async def forget(self, run: Run) -> None:
        """What DELETE does at the run's own worker."""
        await LocalRun(run, self.supervisor, [self.shared]).forget()

    def die(self) -> None:
        """As by ``kill -9``: nothing is written any more."""
        self._nursery.cancel_scope.cancel()


class Scene:
    """Workers, each in a nursery of its own, and one Redis."""

    def __init__(self, nursery: trio.Nursery, redis: RedisServer, limits: SharedLimits) -> None:
        self._nursery = nursery
        self.redis = redis
        self.limits = limits

    async def worker(self, name: str, limits: SharedLimits | None = None) -> Worker:
        """A new worker, known to Redis."""
        worker = await self._nursery.start(self._live, name, limits or self.limits)
        with trio.fail_after(LONG):
            await worker.shared.wait_available()
        assert isinstance(worker, Worker)
        return worker

    async def _live(  # noqa: ASYNC114 - started by ``worker``
        self, name: str, limits: SharedLimits, task_status: trio.TaskStatus[Worker]
    ) -> None:
        async with trio.open_nursery() as nursery:
            task_status.started(Worker(nursery, self.redis, name, limits))
            await trio.sleep_forever()


@asynccontextmanager
async def open_scene(redis: RedisServer, limits: SharedLimits | None = None) -> AsyncIterator[Scene]:
    """Workers with a short lease; all are gone after the block."""
    async with trio.open_nursery() as nursery:
        yield Scene(nursery, redis, limits or SharedLimits(lease=LEASE))
        nursery.cancel_scope.cancel()


async def eventually(condition: Callable[[], object]) -> None:
    """Until the condition is true: of what is in Redis, or in a process, and tells nobody when it changes."""
    with trio.fail_after(LONG):
        while True:
            met = condition()
            if await met if isinstance(met, Awaitable) else met:
                return
            await trio.sleep(0.005)


async def read_to_end(log: EventLog, after: int = 0) -> list[LogEntry]:
    """All entries, as a reader of the run gets them."""
    entries: list[LogEntry] = []
    with trio.fail_after(LONG), log.attached():
        while more := await log.read(entries[-1].seq if entries else after):
            entries += more
    return entries


async def read_until(log: EventLog, enough: Callable[[list[LogEntry]], bool], after: int = 0) -> list[LogEntry]:
    """The entries so far, once they are enough."""
    entries: list[LogEntry] = []
    with trio.fail_after(LONG):  # noqa: ASYNC912 - may be enough already
        while not enough(entries):
            entries += await log.read(entries[-1].seq if entries else after)
    return entries


def said(entries: list[LogEntry]) -> str:
    """The text of the deltas."""
    return "".join(getattr(entry.event, "content", "") for entry in entries if not isinstance(entry.event, Error))


def frames(entries: list[Any]) -> bytes:
    """What goes over the wire."""
    return b"".join(entry.frame for entry in entries)
