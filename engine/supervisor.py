"""The supervisor: owns every run of this worker, finds them by id, keeps them readable after their end.

No exception of a run reaches the nursery here: it becomes the run's ``error`` event (Quart's
own ``app.nursery`` ends every background task when one fails, so this is another one).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from datetime import datetime

import msgspec
import trio

from .observer import RunObserver, SilentObserver
from .run import Run, utc_now
from .spec import RunSpec

RUN_ID_BYTES = 16

RUN_BYTES = 4096
ENTRY_BYTES = 128
"""What Python's objects of an ended run take, and those of each event beyond its text (measured with tracemalloc)."""

_logger = logging.getLogger(__name__)


class RetentionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much of ended runs stays in memory; past a limit, the oldest are dropped.

    Attributes:
        seconds: how long after its end.
        bytes: of all together, about: ``kept_bytes`` of each.
        runs: how many.
    """

    seconds: float = 600.0
    bytes: int = 256 * 2**20
    runs: int = 10_000


class DrainingError(Exception):
    """The server is shutting down and takes no new run."""


class RunSupervisor:
    """Starts runs in a nursery of the caller's and keeps them by id.

    Whoever owns the nursery cancels it in the end; runs still under way then end with ``interrupted``.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        observer: RunObserver | None = None,
        retention: RetentionLimits | None = None,
        new_run_id: Callable[[], str] | None = None,
        wall_clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._nursery = nursery
        self._observer = observer or SilentObserver()
        self._retention = retention or RetentionLimits()
        self.new_run_id = new_run_id or random_run_id
        self._wall_clock = wall_clock
        self._active: dict[str, Run] = {}
        self._ended: dict[str, Run] = {}
        self._ended_bytes = 0
        self._drained = trio.Event()
        self.draining = False

    @property
    def active_runs(self) -> int:
        """How many runs are under way."""
        return len(self._active)

    def start(self, spec: RunSpec, run_id: str | None = None) -> Run:
        """Start a run, of that id if one is given. It waits a few seconds for its first reader, then its grace rules.

        Raises:
            DrainingError: the server is shutting down.
        """
        if self.draining:
            raise DrainingError
        run = Run(run_id or self.new_run_id(), spec, self._observer, self._wall_clock)
        run.on_held = self._retire
        self._nursery.start_soon(self._own, run, name=f"run {run.id}")
        self._active[run.id] = run
        return run

    def find(self, run_id: str) -> Run | None:
        """The run of that id, under way or ended not too long ago."""
        self._forget_expired()
        return self._active.get(run_id) or self._ended.get(run_id)

    def forget(self, run: Run) -> None:
        """Stop the run if it is under way, and drop its log."""
        run.stop()
        if self._ended.pop(run.id, None) is not None:
            self._ended_bytes -= kept_bytes(run)
        self._active.pop(run.id, None)

    async def drain(self, seconds: float) -> None:
        """Take no new runs; let those under way finish for so many seconds, then end them with ``draining``.

        Returns once every log has its end (a whole answer that is just being kept gets its time); the cleanup of runs
        that were ended may still go on. A second call with less patience hurries the first.
        """
        self.draining = True
        if self._active:
            with trio.move_on_after(seconds):
                await self._drained.wait()
            self.end_all()
            for run in list(self._active.values()):
                await run.log.wait_ended()
        self._drained.set()

    async def wait_drained(self) -> None:
        """Until ``drain`` is done: the server ends."""
        await self._drained.wait()

    def end_all(self) -> None:
        """End every run under way with ``draining``, now."""
        for run in list(self._active.values()):
            run.fail("draining", "the server is shutting down")

    async def _own(self, run: Run) -> None:
        try:
            await run.execute()
        except* Exception as bugs:  # a bug ends its own run; a bug in that must still end no other
            _logger.error("run %s could not end itself", run.id, exc_info=bugs)
        finally:
            self._retire(run)

    def _retire(self, run: Run) -> None:
        """The run is over, but perhaps for tools that do not let themselves be cancelled: nobody waits for those."""
        if self._active.pop(run.id, None) is not None:
            self._ended[run.id] = run
            self._ended_bytes += kept_bytes(run)
            self._forget_expired()
        if self.draining and not self._active:
            self._drained.set()

    def _forget_expired(self) -> None:
        """Drop ended runs, oldest first, that are past a limit. No timer: every end and look-up calls this."""
        oldest_allowed = trio.current_time() - self._retention.seconds
        while self._ended:
            oldest = next(iter(self._ended.values()))
            over = self._ended_bytes > self._retention.bytes or len(self._ended) > self._retention.runs
            if not over and (oldest.ended_at is None or oldest.ended_at > oldest_allowed):
                break
            del self._ended[oldest.id]
            self._ended_bytes -= kept_bytes(oldest)


def kept_bytes(run: Run) -> int:
    """About how much memory an ended run takes: its text is there twice, in the events and in their frames.

    Python keeps text with one emoji in it at four bytes a character: such a run takes up to 2.5 times this.
    """
    return RUN_BYTES + ENTRY_BYTES * run.log.last_seq + 2 * run.log.size_bytes


def random_run_id() -> str:
    """A run id that cannot be guessed: 128 random bits in 22 URL-safe characters."""
    return secrets.token_urlsafe(RUN_ID_BYTES)
