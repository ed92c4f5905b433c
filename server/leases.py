"""Which workers live: each one's heartbeat in Redis grows; one that stands still for a lease is a dead one's.

There is no key that expires, because Redis's clock goes on while Redis is down, and every worker would be dead when it
comes back. A worker judges only what it has seen itself without a break: after an outage, or a pause of its own, it
looks on for a whole lease again. Two may judge at once, and a dead worker may come back: the scripts see to it that
each run is ended once (``shared_scripts``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

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
from .store.errors import StoreUnavailableError
from .store.interrupted import LOST_TEXT, Ending

LOST_SEQ = RESERVED_SEQ + 1
"""The number of the event that ends a dead worker's run: after any that a client can have seen."""

UNSETTLED_SEQ = RESERVED_SEQ
"""Its number if the store could not be asked. The store may still end that run by itself, with ``LOST_SEQ``: so no two
events have one number, and who has seen this one reads on there."""

SETTLE_SECONDS = 5.0
"""What the store gets to say how a run ended, before Redis says so alone."""

SETTLE_AGAIN_SECONDS = 0.25
SETTLE_LATER_SECONDS = 5.0
"""Between two tries: while a run waits for its end, and after that."""

_LOST_BATCH_TEXT = "the worker of this batch is gone"
_INBOX_MILLISECONDS = 3_600_000

KnownEvents: TypeAlias = Sequence[tuple[int, str]]
"""A run's events as Redis has them: numbers with their JSON."""

Settle: TypeAlias = Callable[[str, KnownEvents], Awaitable[Ending | None]]

_logger = structlog.get_logger("lumos")


@dataclass
class _Seen:
    beat: bytes
    since: float


class Leases:
    """This worker's heartbeat, and what it sees of the others'.

    Attributes:
        worker: this one's name now.
        settle: has the store keep how a dead worker's run ended, and what Redis has of it; what it then tells is the
            run's end for good. None for a run of which it keeps nothing. Raises StoreUnavailableError. None without a
            store.
        on_buried: called when others have taken this worker for dead; it goes on under the name that this returns.
    """

    def __init__(self, link: Link, worker: str, limits: SharedLimits) -> None:
        self._link = link
        self._limits = limits
        self._seen: dict[str, _Seen] = {}
        self._looked_at = trio.current_time()
        self._claimed: set[str] = set()
        self._unsettled: set[str] = set()
        self._any_claimed = trio.Event()
        self._any_unsettled = trio.Event()
        self._store_answers = True
        self.worker = worker
        self.settle: Settle | None = None
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
        """Beat, watch and end what dead workers left, for ever; ``each_time`` is done with it.

        Raises:
            ExceptionGroup: of RedisAwayError.
        """
        self._seen.clear()
        self._looked_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_claimed)  # beside the heartbeat: the store may keep it waiting
            nursery.start_soon(self._settle_late)
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
        """Take over the runs that a dead worker had; ``work`` ends them. Raises RedisAwayError."""
        for run_id in sorted(run.decode() for run in await self._link.ask("SMEMBERS", runs_key(dead))):
            keys = [run_key(run_id), runs_key(dead), runs_key(self.worker)]
            try:
                is_heir = await self._link.ask(*CLAIM.call(keys, dead, self.worker, run_id))
            except BaseException:
                self._claimed.add(run_id)  # for all that is known
                raise
            if is_heir:
                self._claimed.add(run_id)
                self._any_claimed.set()

    async def _end_claimed(self) -> None:
        while True:
            self._any_claimed = trio.Event()
            if self._claimed:
                self._any_claimed.set()
            await self._any_claimed.wait()
            for run_id in sorted(self._claimed):
                await self._end(run_id)
                self._claimed.discard(run_id)

    async def _end(self, run_id: str) -> None:
        """Write the end of a run, or a batch, that is this worker's by now; nothing if it is not, or has ended."""
        *facts, batch = await self._link.ask("HMGET", run_key(run_id), "worker", "status", BATCH)
        if facts != [self.worker.encode(), b"running"]:
            return
        if batch is not None:
            if await self._end_in_redis(run_id, _lost_alone(Error("worker_lost", _LOST_BATCH_TEXT))):
                _logger.warning("batch.worker_lost", batch_id=run_id)
            return
        known = await self._known(run_id)
        try:
            ending = await self._settled(run_id, known) or _lost_alone(_lost(known))
        except (StoreUnavailableError, trio.TooSlowError) as error:
            _logger.warning("run.end_not_kept", run_id=run_id, reason=str(error) or "too slow")
            ending = _lost_alone(_lost(known), UNSETTLED_SEQ)
            self._unsettled.add(run_id)
            self._any_unsettled.set()
        if await self._end_in_redis(run_id, ending):
            _logger.warning("run.worker_lost", run_id=run_id)
        else:
            self._unsettled.discard(run_id)

    async def _end_in_redis(self, run_id: str, ending: Ending) -> bool:
        keys = [events_key(run_id), run_key(run_id), runs_key(self.worker)]
        facts = msgspec.json.encode([text for fact in ending.facts.items() for text in fact])
        events = [part for numbered in ending.missing for part in numbered]
        live = self._limits.retention_milliseconds
        return bool(await self._link.ask(*END_LOST.call(keys, self.worker, run_id, live, facts, *events)))

    async def _known(self, run_id: str) -> list[tuple[int, str]]:
        entries = await self._link.ask("XRANGE", events_key(run_id), "-", "+")
        return [(int(entry_id.partition(b"-")[0]), event.decode()) for entry_id, (_, event) in entries]

    async def _settled(self, run_id: str, known: KnownEvents) -> Ending | None:
        """What the store says. Once it did not answer, it is asked once for each run, until it does.

        Raises:
            StoreUnavailableError, trio.TooSlowError: it does not answer.
        """
        if self.settle is None:
            return None
        give_up_at = trio.current_time() + SETTLE_SECONDS if self._store_answers else -inf
        while True:
            try:
                with trio.fail_after(SETTLE_SECONDS):
                    ending = await self.settle(run_id, known)
            except (StoreUnavailableError, trio.TooSlowError):
                if trio.current_time() >= give_up_at:
                    self._store_answers = False
                    raise
                await trio.sleep(SETTLE_AGAIN_SECONDS)
            else:
                self._store_answers = True
                return ending

    async def _settle_late(self) -> None:
        """Have the store keep the ends that it could not be asked about, for as long as Redis has them."""
        while True:
            self._any_unsettled = trio.Event()
            for run_id in sorted(self._unsettled - self._claimed):
                known = await self._known(run_id)
                with suppress(StoreUnavailableError, trio.TooSlowError):
                    if known and known[-1][0] == UNSETTLED_SEQ:
                        await self._settled(run_id, known)
                    self._unsettled.discard(run_id)
            if not self._unsettled:
                await self._any_unsettled.wait()
            await trio.sleep(SETTLE_LATER_SECONDS)


def _lost(known: KnownEvents) -> Error:
    """How a run ends of which the store says nothing: with what Redis has."""
    text: list[str] = []
    usage = None
    for _, event_json in known:
        match decode_event(event_json.encode()):
            case TextDelta(content):
                text.append(content)
            case UsageUpdate(reported):
                usage = reported
    return Error("worker_lost", LOST_TEXT, "".join(text), usage)


def _lost_alone(end: Error, seq: int = LOST_SEQ) -> Ending:
    return Ending([(seq, msgspec.json.encode(end).decode())], {"status": "error"})
