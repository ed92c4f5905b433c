"""Which workers live: each one's heartbeat in Redis grows; one that stands still for a lease is a dead one's.

There is no key that expires, because Redis's clock goes on while Redis is down, and every worker would be dead when it
comes back. A worker judges only what it has seen itself without a break: after an outage, or a pause of its own, it
looks on for a whole lease again. Two may judge at once, and a dead worker may come back: the scripts see to it that
each run is ended once (``shared_scripts``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import structlog
import trio

from engine import Error, TextDelta, UsageUpdate

from .log_followers import RESERVED_SEQ
from .redis_link import Link
from .remote_log import decode_event
from .run_uploads import SharedLimits
from .shared_batches import BATCH
from .shared_scripts import (
    BEAT,
    BURY,
    CLAIM,
    END_LOST,
    GRAVE_MILLISECONDS,
    LEAVE,
    WORKERS,
    events_key,
    grave_key,
    inbox_key,
    run_key,
    runs_key,
)

LOST_SEQ = RESERVED_SEQ + 1
"""The number of the event that ends a dead worker's run: after any that a client can have seen."""

_LOST_TEXT = "the worker of this run is gone"
_LOST_BATCH_TEXT = "the worker of this batch is gone"
_INBOX_MILLISECONDS = 3_600_000

_logger = structlog.get_logger("lumos")


@dataclass
class _Seen:
    beat: bytes
    since: float


class Leases:
    """This worker's heartbeat, and what it sees of the others'.

    Attributes:
        worker: this one's name now.
        on_run_lost: called with the id of a run that this worker has ended for a dead one.
        on_buried: called when others have taken this worker for dead; it goes on under the name that this returns.
    """

    def __init__(self, link: Link, worker: str, limits: SharedLimits) -> None:
        self._link = link
        self._limits = limits
        self._seen: dict[str, _Seen] = {}
        self._looked_at = trio.current_time()
        self._claimed: set[str] = set()
        self.worker = worker
        self.on_run_lost: Callable[[str], Awaitable[None]] | None = None
        self.on_buried: Callable[[], str] = lambda: worker

    async def beat(self) -> None:
        """Say once that this worker lives. If others think otherwise, it goes on under another name."""
        keys = [WORKERS, grave_key(self.worker), inbox_key(self.worker)]
        if await self._link.ask(*BEAT.call(keys, self.worker, _INBOX_MILLISECONDS)) == -1:
            dead, self.worker = self.worker, self.on_buried()
            _logger.warning("worker.was_given_up", worker=dead, now=self.worker)
            await self.beat()
            await self.end_runs_of(dead)

    async def work(self, each_time: Callable[[], Awaitable[None]]) -> None:
        """Beat and watch, for ever; ``each_time`` is done with it. Raises RedisAwayError."""
        self._seen.clear()
        self._looked_at = trio.current_time()
        await self._end_claimed()
        while True:
            await self.beat()
            await self._watch()
            await each_time()
            await trio.sleep(self._limits.lease / 3)

    async def leave(self) -> None:
        """Say that this worker goes in peace; if it leaves runs behind, others end them after the lease."""
        keys = [WORKERS, runs_key(self.worker), inbox_key(self.worker)]
        await self._link.ask(*LEAVE.call(keys, self.worker))

    async def _watch(self) -> None:
        now = trio.current_time()
        if now - self._looked_at > self._limits.lease:
            self._seen.clear()  # this process, or Redis, stood still itself
        self._looked_at = now
        beats = await self._link.ask("HGETALL", WORKERS)
        now = trio.current_time()
        seen = {}
        for name, beat in ((name.decode(), beat) for name, beat in beats.items() if name != self.worker.encode()):
            before = self._seen.get(name)
            seen[name] = before if before is not None and before.beat == beat else _Seen(beat, now)
        self._seen = seen
        for name, last in seen.items():
            if now - last.since > self._limits.lease:
                await self._bury(name, last.beat)

    async def _bury(self, dead: str, beat: bytes) -> None:
        bury = BURY.call([WORKERS, grave_key(dead)], dead, beat, GRAVE_MILLISECONDS)
        if not await self._link.ask(*bury):
            return
        await self.end_runs_of(dead)
        await self._link.ask(*LEAVE.call([WORKERS, runs_key(dead), inbox_key(dead)], dead))

    async def end_runs_of(self, dead: str) -> None:
        """End the runs that a dead worker had.

        Raises:
            RedisAwayError: some may be claimed and not ended: ``work`` ends them when it starts again.
        """
        for run_id in sorted(run.decode() for run in await self._link.ask("SMEMBERS", runs_key(dead))):
            self._claimed.add(run_id)  # before the answer, which may be lost
            keys = [run_key(run_id), runs_key(dead), runs_key(self.worker)]
            if await self._link.ask(*CLAIM.call(keys, dead, self.worker, run_id)):
                await self._end(run_id)
            self._claimed.discard(run_id)

    async def _end_claimed(self) -> None:
        for run_id in sorted(self._claimed):
            await self._end(run_id)
            self._claimed.discard(run_id)

    async def _end(self, run_id: str) -> None:
        """Write the end of a run that is this worker's by now; nothing if it is not, or has ended."""
        batched = bool(await self._link.ask("HEXISTS", run_key(run_id), BATCH))
        lost = msgspec.json.encode(Error("worker_lost", _LOST_BATCH_TEXT) if batched else await self._lost(run_id))
        keys = [events_key(run_id), run_key(run_id), runs_key(self.worker)]
        end = END_LOST.call(keys, self.worker, run_id, LOST_SEQ, lost, self._limits.retention_milliseconds)
        if not await self._link.ask(*end):
            return
        if batched:
            _logger.warning("batch.worker_lost", batch_id=run_id)
        else:
            _logger.warning("run.worker_lost", run_id=run_id)
            if self.on_run_lost is not None:
                await self.on_run_lost(run_id)

    async def _lost(self, run_id: str) -> Error:
        text: list[str] = []
        usage = None
        for _, (_, event_json) in await self._link.ask("XRANGE", events_key(run_id), "-", "+"):
            match decode_event(event_json):
                case TextDelta(content):
                    text.append(content)
                case UsageUpdate(reported):
                    usage = reported
        return Error("worker_lost", _LOST_TEXT, "".join(text), usage)
