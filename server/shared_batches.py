"""Batches across workers: each one is written to Redis like one more run, and read elsewhere like one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import msgspec

from engine import Run

from .batch_log import Batch, BatchedFrame, BatchedRun, BatchLog, BatchRefusal, BatchStarted
from .remote_log import RemoteLog
from .run_directory import GoneError
from .shared_scripts import Script
from .store.rows import RunStatus

if TYPE_CHECKING:
    from .shared_log import SharedLog

BATCH = "batch"
"""The field of a hash in Redis that makes it a batch's: its first frames as JSON."""

IN_BATCH = "in_batch"
"""The field of a run's hash that names its batch."""

JOIN = Script("""
-- keys: run; arguments: batch id
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'in_batch', ARGV[1]) end
return 1
""")

_decode_head = msgspec.json.Decoder(list[BatchStarted | BatchRefusal]).decode


class BatchUpload:
    """A batch of this worker's as what is written of it. It holds the runs, so that all of it is written.

    Attributes:
        facts: what its hash says of it.
    """

    def __init__(self, batch: Batch, runs: Sequence[Run]) -> None:
        self.id = batch.batch_id
        self.runs = tuple(runs)
        self.log = BatchLog(batch, [run.log for run in runs])
        self.facts = {
            "tenant_id": batch.tenant_id,
            "user_id": batch.user_id,
            BATCH: msgspec.json.encode(batch.head).decode(),
        }

    def end(self) -> dict[str, str]:
        """What its hash says once all of its runs have ended."""
        return {"status": "done"} if self.log.ended else {}


class SharedBatch:
    """Another worker's batch; a ``BatchHandle``."""

    def __init__(self, batch_id: str, facts: dict[str, str], shared: SharedLog) -> None:
        """A batch of which this is in Redis. Its ``log`` comes later, if there is one."""
        self.batch_id = batch_id
        self.tenant_id = facts.get("tenant_id", "")
        self.user_id = facts.get("user_id", "")
        head = _decode_head(facts[BATCH])
        self.runs: tuple[BatchedRun, ...] = tuple(
            run for one in head if isinstance(one, BatchStarted) for run in one.runs
        )
        self.refusals = tuple(one for one in head if isinstance(one, BatchRefusal))
        self.log: RemoteLog | None = None
        self._shared = shared

    @property
    def last_seq(self) -> int:
        """The number of the newest frame that is known here."""
        return 0 if self.log is None else self.log.last_seq

    def statuses(self) -> list[RunStatus | None]:
        """How each of its runs stands; None where the frames do not tell: the batch was cut off, or is gone."""
        found: dict[str, RunStatus] = {}
        for entry in () if self.log is None else self.log.entries:
            match cast(object, entry.event):
                case BatchedFrame("done" | "error" | "stop" as status, str(run_id)):
                    found[run_id] = cast(RunStatus, status)
        under_way: RunStatus | None = None if self.log is None or self.log.ended else "running"
        return [found.get(run.run_id, under_way) for run in self.runs]

    async def stop(self) -> None:
        """Have its worker stop its runs; returns once that is known here, or after a time.

        Raises:
            SourceUnavailableError: Redis is away: whether they stop is not known.
        """
        await self._shared.stop(await self._kept_runs() if self.log is None else [self.log], "requested")

    async def _kept_runs(self) -> list[RemoteLog]:
        """Of a batch that is gone, the runs that are not: no worker stops those by the batch's name any more."""
        logs = []
        for run in self.runs:
            with suppress(GoneError):
                if (found := await self._shared.find(run.run_id)) is not None:
                    logs.append(found.log)
        return logs
