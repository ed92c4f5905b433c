"""This worker's runs on their way to Redis: what is new of every run, many in one write, off the way of the tokens.

The buffer is the run's own log: Redis says after each write up to where it has the run, and the next write goes on from
there. So an outage costs nothing but memory that is there anyway, a write whose answer was lost is not done twice, and
a Redis that comes back with less than it had (its disk is a second behind) gets the rest again.

Several runs that are streamed as one (a ``Batch``) are written like one more run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
import structlog
import trio

from engine import LogEntry, Run
from engine.events import data_of
from engine.log import RunLog

from .redis_link import Link
from .shared_batches import JOIN, BatchUpload
from .shared_scripts import APPEND, OPEN, events_key, run_key, runs_key

GATHER_SECONDS = 0.05
"""How long events of runs that nobody reads elsewhere gather before they are written."""

RUNS_AT_ONCE = 200
EVENTS_AT_ONCE = 500
BYTES_AT_ONCE = 256 * 1024
"""Of one run in one write: Redis does nothing else meanwhile."""

ENDED_KEPT_SECONDS = 30.0
"""How long an ended run is kept at hand after it was written: a Redis that loses its last seconds gets them again."""

ENDED_KEPT_BYTES = 64 * 2**20
"""Of ended runs; past it the oldest go, also those that an outage keeps from being written."""

DROP_EVERY_SECONDS = 1.0

_logger = structlog.get_logger("lumos")


class SharedLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds.

    Attributes:
        lease: how long a worker may be silent before others take it for dead; it speaks every third of that.
        retention: how long an ended run can be read from Redis.
    """

    lease: float = 10.0
    retention: float = 600.0

    @property
    def running_milliseconds(self) -> int:
        """How long Redis keeps a run under way that is not touched. ``RunUploads.touch_all`` touches it in time."""
        return int(1000 * max(self.retention, 60 * self.lease))

    @property
    def retention_milliseconds(self) -> int:
        """How long Redis keeps an ended run."""
        return max(1, int(1000 * self.retention))


class _WrittenLog(Protocol):
    @property
    def run_id(self) -> str: ...
    @property
    def last_seq(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    @property
    def size_bytes(self) -> int: ...
    def entries(self, after: int = 0, until: int | None = None) -> list[LogEntry]: ...


@dataclass(eq=False)
class _Upload:
    log: _WrittenLog
    facts: Mapping[str, str]
    end: Callable[[], Mapping[str, str]]
    of: Run | BatchUpload
    sent: int = 0
    opened: bool = False
    ended_at: float | None = None

    @property
    def id(self) -> str:
        return self.log.run_id

    @property
    def complete(self) -> bool:
        return self.log.ended and self.sent == self.log.last_seq


class RunUploads:
    """A ``LogFollower``: writes every run that it is told of. ``work`` does it, for as long as there is a connection.

    Attributes:
        worker: under which name; ``lose_all`` comes before it changes.
        on_lost: called with a run that is another worker's by now, because this one was taken for dead.
    """

    def __init__(self, link: Link, worker: str, limits: SharedLimits) -> None:
        self._link = link
        self._limits = limits
        self._uploads: dict[str, _Upload] = {}
        self._batch_of: dict[str, str] = {}
        self._dirty: dict[str, None] = {}
        self._any_dirty = trio.Event()
        self._urgent = trio.Event()
        self._written = trio.lowlevel.ParkingLot()
        self._read_elsewhere: set[str] = set()
        self.worker = worker
        self.on_lost: Callable[[Run], None] = lambda _run: None

    def follow(self, run: Run) -> None:
        """Write this run from now on. Synchronous, never waits."""
        self._add(_Upload(run.log, _facts(run), partial(_end, run), run))

    def follow_batch(self, batch: BatchUpload) -> None:
        """Write this batch of runs that are followed, too. Synchronous, never waits."""
        self._batch_of.update(dict.fromkeys((run.id for run in batch.runs), batch.id))
        self._add(_Upload(batch.log, batch.facts, batch.end, batch))

    def appended(self, log: RunLog) -> None:
        """There is something to write. Synchronous, on the way of every token."""
        if log.run_id in self._uploads:
            self._mark(log.run_id)
        if (batch_id := self._batch_of.get(log.run_id)) is not None:
            self._mark(batch_id)

    def batch(self, batch_id: str) -> BatchUpload | None:
        """The batch of that id, if it is written here."""
        upload = self._uploads.get(batch_id)
        return upload.of if upload is not None and isinstance(upload.of, BatchUpload) else None

    def ending(self, run_id: str) -> list[str]:
        """What its hash is to say of a run that has ended and is written here, fields and values; nothing of others."""
        upload = self._uploads.get(run_id)
        return [] if upload is None or not upload.log.ended else _flat(upload.end().items())

    def hurry(self, run_id: str, read_elsewhere: bool) -> None:
        """Whether others wait for each event of this run: it is written without gathering then."""
        if read_elsewhere:
            self._read_elsewhere.add(run_id)
            if run_id in self._dirty:
                self._urgent.set()
        else:
            self._read_elsewhere.discard(run_id)

    def abandon(self, run_id: str) -> None:
        """Write nothing more of this run, or of this batch."""
        upload = self._uploads.pop(run_id, None)
        if upload is not None and isinstance(upload.of, BatchUpload):
            for run in upload.of.runs:
                self._batch_of.pop(run.id, None)
        self._dirty.pop(run_id, None)
        self._read_elsewhere.discard(run_id)

    def lose_all(self) -> list[Run]:
        """This worker was taken for dead: the runs that it had, which are not its any more. Nor are their batches."""
        lost = [upload.of for upload in self._uploads.values() if upload.opened and not upload.ended_at]
        for each in lost:
            self.abandon(each.id)
        return [each for each in lost if isinstance(each, Run)]

    async def wait_all_sent(self) -> None:
        """Until Redis has everything."""
        while self._dirty or not all(upload.complete for upload in self._uploads.values()):
            await self._written.park()

    async def wait_opened(self, run_id: str) -> None:
        """Until Redis knows of this run, or batch; at once if it is not written here."""
        while (upload := self._uploads.get(run_id)) is not None and not upload.opened:  # noqa: ASYNC110 - it is told
            await self._written.park()

    async def wait_sent(self, run_id: str) -> None:
        """Until Redis has all of this run, which has ended; at once if it is not written here. It is written now."""
        while (upload := self._uploads.get(run_id)) is not None and not upload.complete:  # noqa: ASYNC110 - it is told
            self._mark(run_id)
            self._urgent.set()
            await self._written.park()

    async def work(self) -> None:
        """Write what there is to write, for ever. Raises RedisAwayError; what was under way is asked for again then."""
        for run_id in self._uploads:
            self._mark(run_id)  # Redis may have lost something
        while True:
            await self._wait_dirty()
            batch = [self._uploads[run_id] for run_id in list(self._dirty)[:RUNS_AT_ONCE]]
            for upload in batch:
                del self._dirty[upload.id]
            await self._write(batch)
            self._written.unpark_all()

    async def touch_all(self) -> None:
        """Keep runs under way from expiring, for ever: the silent ones too."""
        while True:
            await trio.sleep(self._limits.running_milliseconds / 4000)
            for upload in self._uploads.values():
                if not upload.complete:
                    self._mark(upload.id)

    async def drop_ended(self) -> None:
        """Let go of ended runs in time, for ever, whether there is a connection or not."""
        while True:
            await trio.sleep(DROP_EVERY_SECONDS)
            self._drop_ended()

    def _add(self, upload: _Upload) -> None:
        self._uploads[upload.id] = upload
        self._mark(upload.id)
        self._urgent.set()  # its id is about to be told: it is to be found anywhere

    def _mark(self, run_id: str) -> None:
        self._dirty[run_id] = None
        self._any_dirty.set()
        if run_id in self._read_elsewhere:
            self._urgent.set()

    async def _wait_dirty(self) -> None:
        while not self._dirty:
            self._any_dirty = trio.Event()
            await self._any_dirty.wait()
        with trio.move_on_after(GATHER_SECONDS):
            await self._urgent.wait()
        self._urgent = trio.Event()
        if any(run_id in self._read_elsewhere for run_id in list(self._dirty)[RUNS_AT_ONCE:]):
            self._urgent.set()

    async def _write(self, batch: list[_Upload]) -> None:
        new = [upload for upload in batch if not upload.opened]
        for upload, answer in zip(new, await self._link.ask_all([self._opening(u) for u in new]), strict=True):
            upload.opened = answer == 1
            if not upload.opened:
                self._lose(upload)
        self._written.unpark_all()  # who only waits for the opening
        writing = [upload for upload in batch if upload.opened]
        joining = [command for upload in new if upload.opened for command in _joining(upload)]
        answers = await self._link.ask_all([*joining, *(self._appending(upload) for upload in writing)])
        for upload, last in zip(writing, answers[len(joining) :], strict=True):
            self._settle(upload, last)

    def _settle(self, upload: _Upload, last: int) -> None:
        if self._uploads.get(upload.id) is not upload:
            return  # abandoned meanwhile
        if last == -2:
            self._lose(upload)
            return
        if last == -1:
            upload.opened = False
        upload.sent = max(0, last)
        if upload.sent < upload.log.last_seq:
            self._mark(upload.id)
        elif upload.complete and upload.ended_at is None:
            upload.ended_at = trio.current_time()

    def _lose(self, upload: _Upload) -> None:
        self.abandon(upload.id)
        if isinstance(upload.of, Run):  # a batch may just have been forgotten, with one of its runs
            _logger.warning("run.lost", run_id=upload.id)
            self.on_lost(upload.of)

    def _opening(self, upload: _Upload) -> list[str | bytes | int]:
        return OPEN.call(
            [run_key(upload.id), runs_key(self.worker)],
            self.worker,
            upload.id,
            self._limits.running_milliseconds,
            *_flat(upload.facts.items()),
        )

    def _appending(self, upload: _Upload) -> list[str | bytes | int]:
        events: list[bytes | int] = []
        size = 0
        for entry in upload.log.entries(upload.sent, upload.sent + EVENTS_AT_ONCE):
            events += (entry.seq, data_of(entry.frame))
            size += len(entry.frame)
            if size > BYTES_AT_ONCE:
                break
        return APPEND.call(
            [events_key(upload.id), run_key(upload.id), runs_key(self.worker)],
            self.worker,
            upload.id,
            self._limits.running_milliseconds,
            upload.log.last_seq if upload.log.ended else 0,
            self._limits.retention_milliseconds,
            msgspec.json.encode(_flat(upload.end().items())),
            *events,
        )

    def _drop_ended(self) -> None:
        now = trio.current_time()
        ended = [upload for upload in self._uploads.values() if upload.log.ended]
        size = sum(upload.log.size_bytes for upload in ended)
        for upload in ended:
            old = upload.ended_at is not None and now - upload.ended_at > ENDED_KEPT_SECONDS
            if old or size > ENDED_KEPT_BYTES:
                if not upload.complete:
                    _logger.warning("run.not_shared", run_id=upload.id, sent=upload.sent, last_seq=upload.log.last_seq)
                size -= upload.log.size_bytes
                self.abandon(upload.id)


def _joining(upload: _Upload) -> list[list[str | bytes | int]]:
    """Commands that have a batch's runs name it: who forgets one of them forgets the batch."""
    runs = upload.of.runs if isinstance(upload.of, BatchUpload) else ()
    return [JOIN.call([run_key(run.id)], upload.id) for run in runs]


def _facts(run: Run) -> dict[str, str]:
    owner = run.spec.owner
    return {
        "agent_id": run.spec.agent_id,
        "tenant_id": owner.tenant_id,
        "user_id": owner.user_id,
        "session_id": owner.session_id,
    }


def _end(run: Run) -> dict[str, str]:
    """What its hash says of a run that has ended."""
    if run.log.terminal is None:
        return {}
    status = str(run.log.terminal.__struct_config__.tag)
    ttfb = "" if run.ttfb_ms is None else f"{run.ttfb_ms:.3f}"
    return {"status": status, "elapsed_ms": f"{run.elapsed_ms:.3f}", "ttfb_ms": ttfb}


def _flat(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [text for pair in pairs for text in pair]
