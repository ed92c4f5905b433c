"""Finds a batch wherever it is: in this worker, by id, for as long as its runs are kept, or at another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from engine import Run, RunSupervisor
from engine.log import EventLog

from .batch_log import Batch, BatchedRun, BatchLog, BatchRefusal
from .run_directory import STOP_SECONDS
from .run_view import run_view
from .store.rows import RunStatus

MAX_BATCHES = 10_000
"""A batch without a run in memory is a name that answers 410; the oldest of those make room, then the oldest of all."""


class BatchHandle(Protocol):
    """A batch wherever it is. Whose it is, the one who asks for it checks."""

    @property
    def batch_id(self) -> str:
        """The batch's id."""
        ...

    @property
    def tenant_id(self) -> str:
        """Whose it is."""
        ...

    @property
    def user_id(self) -> str:
        """Whose it is."""
        ...

    @property
    def runs(self) -> tuple[BatchedRun, ...]:
        """The runs that it started."""
        ...

    @property
    def refusals(self) -> tuple[BatchRefusal, ...]:
        """What it could not start."""
        ...

    @property
    def log(self) -> EventLog | None:
        """Its frames; None once they are not kept any more: a run of it was forgotten, or ended too long ago."""
        ...

    @property
    def last_seq(self) -> int:
        """The number of its newest frame that is known here."""
        ...

    def statuses(self) -> list[RunStatus | None]:
        """How each of its runs stands; None where it is not known here."""
        ...

    async def stop(self) -> None:
        """Stop its runs; returns once that is known here, in bounded time. Raises SourceUnavailableError."""
        ...


class SharedBatches(Protocol):
    """Where workers have each other's batches."""

    def follow_batch(self, batch: Batch, runs: Sequence[Run]) -> None:
        """Let the others have this batch of these runs of this worker's."""
        ...

    async def find_batch(self, batch_id: str) -> BatchHandle | None:
        """The batch, if it is known there. Raises SourceUnavailableError."""
        ...


class LocalBatch:
    """A batch of this worker's; a run that memory has dropped is None."""

    def __init__(self, batch: Batch, runs: Sequence[Run | None]) -> None:
        self.batch_id = batch.batch_id
        self.tenant_id = batch.tenant_id
        self.user_id = batch.user_id
        self.runs = batch.runs
        self.refusals = batch.refusals
        self._batch = batch
        self._kept = [run for run in runs if run is not None]
        self._runs = runs
        whole = len(self._kept) == len(runs)
        self.log = BatchLog(batch, [run.log for run in self._kept]) if whole else None

    @property
    def last_seq(self) -> int:
        """The newest number that was given."""
        return self._batch.last_seq

    def statuses(self) -> list[RunStatus | None]:
        """See ``BatchHandle``."""
        return [None if run is None else run_view(run).status for run in self._runs]

    async def stop(self) -> None:
        """Stop all; answers that are complete and just being kept are waited for instead."""
        for run in self._kept:
            run.stop()
        with trio.move_on_after(STOP_SECONDS):  # noqa: ASYNC912 - they may have ended
            for run in self._kept:
                await run.log.wait_ended()
        if self.log is not None:
            self.log.entries(self.last_seq)  # numbers what is new


class BatchDirectory:
    """This worker's batches first, then the others'. Keeps what the runs' logs do not: the batches' orders."""

    def __init__(
        self, supervisor: RunSupervisor, shared: SharedBatches | None = None, max_batches: int = MAX_BATCHES
    ) -> None:
        self._supervisor = supervisor
        self._shared = shared
        self._max_batches = max_batches
        self._batches: dict[str, Batch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch, runs: list[Run]) -> BatchHandle:
        """Keep a new batch over these runs, which wake its readers from now on."""
        if len(self._batches) >= self._max_batches:
            self._make_room()
        self._batches[batch.batch_id] = batch
        for run in runs:
            run.log.also_wake(batch.waiting)
        if self._shared is not None:
            self._shared.follow_batch(batch, runs)
        return LocalBatch(batch, runs)

    async def find(self, batch_id: str) -> BatchHandle | None:
        """The batch of that id. Where its frames are wins over where they are gone.

        Raises:
            SourceUnavailableError: it is not here, and the other workers cannot be asked.
        """
        local = self.find_here(batch_id)
        if self._shared is None or (local is not None and local.log is not None):
            return local
        shared = await self._shared.find_batch(batch_id)
        # Without frames on either side it is this one's that is to be stopped: its runs are here.
        return local if local is not None and (shared is None or shared.log is None) else shared

    def find_here(self, batch_id: str) -> BatchHandle | None:
        """The batch of that id, if this worker has started it."""
        batch = self._batches.get(batch_id)
        return None if batch is None else LocalBatch(batch, self._runs(batch))

    def _runs(self, batch: Batch) -> list[Run | None]:
        return [self._supervisor.find(run.run_id) for run in batch.runs]

    def _make_room(self) -> None:
        """Drop those whose events are gone, and the oldest until a tenth is free, so that this is seldom done."""
        kept = [batch for batch in self._batches.values() if None not in self._runs(batch)]
        room = self._max_batches - self._max_batches // 10 - 1
        self._batches = {batch.batch_id: batch for batch in kept[max(0, len(kept) - room) :]}
