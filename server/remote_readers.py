"""Readers at other workers count as readers of a run: what its grace waits for, and whom its text is sealed for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from engine.log import EventLog

from .run_uploads import RunUploads


class ReadElsewhere(Protocol):
    """What others read: a run of this worker's, or a batch."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def log(self) -> EventLog:
        """Its events."""
        ...


class RemoteReaders:
    """Which workers have readers of this worker's runs. For each run that has any, one task reads as they would.

    That task is a reader of the run, and what it takes is sealed and written at once; it ends with the run.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        find: Callable[[str], ReadElsewhere | None],
        uploads: RunUploads,
        lease: float,
    ) -> None:
        self._nursery = nursery
        self._find = find
        self._uploads = uploads
        self._lease = lease
        self._heard_at: dict[str, dict[str, float]] = defaultdict(dict)  # of each run: by worker, when
        self._reading: dict[str, trio.CancelScope] = {}

    def came(self, worker: str, run_ids: Iterable[str]) -> None:
        """The worker has readers of these runs, now."""
        for run_id in run_ids:
            run = self._find(run_id)
            if run is None or run.log.ended:
                continue
            self._heard_at[run_id][worker] = trio.current_time()
            if run_id not in self._reading:
                self._reading[run_id] = scope = trio.CancelScope()
                self._nursery.start_soon(self._read, run, scope, name=f"read {run_id} for others")

    def left(self, worker: str, run_ids: Iterable[str]) -> None:
        """The worker has no reader of these runs any more."""
        for run_id in run_ids:
            heard_at = self._heard_at.get(run_id, {})
            heard_at.pop(worker, None)
            if not heard_at and run_id in self._reading:
                self._reading.pop(run_id).cancel(reason="no reader elsewhere is left")
                self._heard_at.pop(run_id, None)

    def forgive(self) -> None:
        """There was an outage: who was heard before it counts as heard now."""
        now = trio.current_time()
        for heard_at in self._heard_at.values():
            heard_at.update(dict.fromkeys(heard_at, now))

    def drop_silent(self) -> None:
        """Readers that have not been heard of for a lease are gone."""
        oldest = trio.current_time() - self._lease
        for run_id, heard_at in list(self._heard_at.items()):
            for worker in [worker for worker, at in heard_at.items() if at < oldest]:
                self.left(worker, [run_id])

    async def _read(self, run: ReadElsewhere, scope: trio.CancelScope) -> None:
        with scope, run.log.attached():
            self._uploads.hurry(run.id, True)
            seq = run.log.last_seq
            while not run.log.ended:
                if entries := await run.log.read(seq):
                    seq = entries[-1].seq
        if not scope.cancel_called:
            self._reading.pop(run.id, None)
            self._heard_at.pop(run.id, None)
        if run.id not in self._reading:
            self._uploads.hurry(run.id, False)
