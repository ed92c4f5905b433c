"""Finds a run wherever it is: in this process, in the log that workers share, in the journal of the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from engine import Run, RunSupervisor
from engine.log import EventLog
from engine.memory import Owner
from engine.run import SAVE_SECONDS

from .run_view import RunView, run_view

STOP_SECONDS = SAVE_SECONDS + 1.0


class RunHandle(Protocol):
    """A run wherever it is. Whose it is, the one who asks for it checks."""

    @property
    def run_id(self) -> str:
        """The run's id."""
        ...

    @property
    def agent_id(self) -> str:
        """Whom it asks."""
        ...

    @property
    def owner(self) -> Owner:
        """Whose it is."""
        ...

    @property
    def log(self) -> EventLog:
        """Its events."""
        ...

    def view(self) -> RunView:
        """Its state, as far as it is known here."""
        ...

    async def stop(self, reason: str = "requested") -> None:
        """Stop it; returns once its terminal event is known here, in bounded time. Of an ended run: nothing."""
        ...

    async def forget(self) -> None:
        """Stop it and drop its events everywhere."""
        ...


class EventsAwayError(Exception):
    """The run is known, and its events are not to be had here.

    Attributes:
        view: what is known of it.
        owner: whose it is.
    """

    def __init__(self, view: RunView, owner: Owner) -> None:
        super().__init__(f"the events of run {view.run_id} are not here")
        self.view = view
        self.owner = owner


class GoneError(EventsAwayError):
    """The events are not kept any more: too old, forgotten, or lost."""


class ElsewhereError(EventsAwayError):
    """Another process has the run, and this one has no way to it."""


class SourceUnavailableError(Exception):
    """What a source asks does not answer now: the run may be there or not."""


class RunSource(Protocol):
    """Where runs are that this process does not have in memory."""

    async def find(self, run_id: str) -> RunHandle | None:
        """The run, if the source knows of it.

        Raises:
            GoneError, ElsewhereError: it is known, without its events.
            SourceUnavailableError: the source cannot tell now.
        """
        ...

    async def forget(self, run_id: str) -> None:
        """Drop what the source keeps of a run of this process's. Raises SourceUnavailableError."""
        ...


class RunDirectory:
    """This process's runs first, then the sources in order."""

    def __init__(self, supervisor: RunSupervisor, sources: Sequence[RunSource] = ()) -> None:
        self._supervisor = supervisor
        self._sources = sources

    async def find(self, run_id: str) -> RunHandle | None:
        """The run of that id; None if nobody knows of one.

        A source that has its events wins over one that cannot tell, and that one over one where they are gone. Of two
        where they are gone, the last one's view counts: the store knows more than what workers share.

        Raises:
            GoneError, ElsewhereError: it is known, without its events.
            SourceUnavailableError: it was not found where it could be asked for.
        """
        run = self._supervisor.find(run_id)
        if run is not None:
            return self.local(run)
        failures: list[SourceUnavailableError | EventsAwayError] = []
        for source in self._sources:
            try:
                handle = await source.find(run_id)
            except (SourceUnavailableError, EventsAwayError) as failure:
                failures.append(failure)
            else:
                if handle is not None:
                    return handle
        if failures:
            raise min(reversed(failures), key=_weight)
        return None

    def local(self, run: Run) -> RunHandle:
        """A run of this process's as what ``find`` gives."""
        return LocalRun(run, self._supervisor, self._sources)


class LocalRun:
    """A run of this process's."""

    def __init__(self, run: Run, supervisor: RunSupervisor, sources: Sequence[RunSource] = ()) -> None:
        self.run = run
        self.run_id = run.id
        self.agent_id = run.spec.agent_id
        self.owner = run.spec.owner
        self.log: EventLog = run.log
        self._supervisor = supervisor
        self._sources = sources

    def view(self) -> RunView:
        """Its state now."""
        return run_view(self.run)

    async def stop(self, reason: str = "requested") -> None:
        """Stop it; an answer that is complete and just being kept is waited for instead."""
        self.run.stop(reason)
        with trio.move_on_after(STOP_SECONDS):
            await self.run.log.wait_ended()

    async def forget(self) -> None:
        """Stop it and drop its events, here and in every source.

        Raises:
            SourceUnavailableError: a source keeps them, for all that is known; they are dropped here.
        """
        self._supervisor.forget(self.run)
        with trio.move_on_after(STOP_SECONDS):
            await self.run.wait_over()  # the store says that it goes on until then
        for source in self._sources:
            await source.forget(self.run_id)


_WEIGHTS = (SourceUnavailableError, GoneError, ElsewhereError)


def _weight(failure: Exception) -> int:
    return next(weight for weight, kind in enumerate(_WEIGHTS) if isinstance(failure, kind))
