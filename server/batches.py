"""The batches of this worker, by id, for as long as their runs are kept."""

from __future__ import annotations

from engine import Run, RunSupervisor

from .batch_log import Batch, BatchLog
from .principal import Principal

MAX_BATCHES = 10_000
"""A batch without a run in memory is a name that answers 410; the oldest of those make room, then the oldest of all."""


class BatchGoneError(Exception):
    """Events of the batch are no longer kept: a run of it was forgotten, or ended too long ago."""


class BatchDirectory:
    """Keeps what the runs' logs do not: the batches' orders. The runs stay the supervisor's."""

    def __init__(self, supervisor: RunSupervisor, max_batches: int = MAX_BATCHES) -> None:
        self._supervisor = supervisor
        self._max_batches = max_batches
        self._batches: dict[str, Batch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch, runs: list[Run]) -> BatchLog:
        """Keep a new batch over these runs, which wake its readers from now on; its log."""
        if len(self._batches) >= self._max_batches:
            self._make_room()
        self._batches[batch.batch_id] = batch
        for run in runs:
            run.log.also_wake(batch.waiting)
        return BatchLog(batch, [run.log for run in runs])

    def find(self, batch_id: str, caller: Principal) -> Batch | None:
        """The batch of that id, if it is the caller's to see."""
        batch = self._batches.get(batch_id)
        return batch if batch is not None and caller.may_see(batch.tenant_id, batch.user_id) else None

    def runs(self, batch: Batch) -> list[Run | None]:
        """The batch's runs, in order; None for one that memory has dropped."""
        return [self._supervisor.find(run.run_id) for run in batch.runs]

    def log(self, batch: Batch) -> BatchLog:
        """The batch's log.

        Raises:
            BatchGoneError: not all of it is there any more.
        """
        runs = [run for run in self.runs(batch) if run is not None]
        if len(runs) < len(batch.runs):
            raise BatchGoneError
        return BatchLog(batch, [run.log for run in runs])

    def _make_room(self) -> None:
        """Drop those whose events are gone, and the oldest until a tenth is free, so that this is seldom done."""
        kept = [batch for batch in self._batches.values() if None not in self.runs(batch)]
        room = self._max_batches - self._max_batches // 10 - 1
        self._batches = {batch.batch_id: batch for batch in kept[max(0, len(kept) - room) :]}
