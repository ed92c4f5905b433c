"""Who copies runs' events elsewhere (the journal, the shared log): told of every run and of every event, in turn.

A follower only notes that there is something to copy; a task of its own copies in batches. What it is told is on the
way of every token, so it does next to nothing there, and it takes what it copies from ``run.log.entries`` later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from engine import Run, RunLog
from engine.emitter import CLOSING_BYTES
from engine.observer import RunObserver, SilentObserver

from .store.run_events import RESERVED_SEQ

__all__ = ["MIN_FRAME_BYTES", "RESERVED_SEQ", "LogFollower", "LogFollowers", "may_follow"]

MIN_FRAME_BYTES = 32
"""``id: .1``, ``data: {"chunk_type":""}`` and the line ends: no frame is shorter."""

_logger = logging.getLogger(__name__)


class LogFollower(Protocol):
    """Copies runs' events elsewhere. Both methods are synchronous and do not block."""

    def follow(self, run: Run) -> None:
        """A run has started: its first events are in its log."""
        ...

    def appended(self, log: RunLog) -> None:
        """There is one event more, perhaps the terminal one (``log.ended``). On the way of every token."""
        ...


class LogFollowers:
    """The observer that a supervisor gets: passes everything on to another, and lets followers follow every run.

    A follower that raises loses that run, and is logged; neither the run nor the other followers notice.
    """

    def __init__(self, *followers: LogFollower, observer: RunObserver | None = None) -> None:
        self._followers = followers
        self._observer = observer or SilentObserver()

    def run_started(self, run: Run) -> None:
        """Have the run followed; its first events were appended before anybody could hear of them."""
        followers = [follower for follower in self._followers if _follows(follower, run)]
        if followers:
            run.log.on_append = _teller(followers)
        self._observer.run_started(run)

    def run_first_token(self, run: Run) -> None:
        """Pass it on."""
        self._observer.run_first_token(run)

    def run_ended(self, run: Run) -> None:
        """Pass it on."""
        self._observer.run_ended(run)

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """Pass it on."""
        self._observer.run_crashed(run, bug)


def may_follow(run: Run) -> bool:
    """Whether the run's own limit keeps its numbers below ``RESERVED_SEQ``.

    A log's frames are at most ``2 * max_run_bytes + CLOSING_BYTES`` (see the emitter), and each has its least size.
    """
    return 2 * run.spec.max_run_bytes + CLOSING_BYTES < RESERVED_SEQ * MIN_FRAME_BYTES


def _follows(follower: LogFollower, run: Run) -> bool:
    try:
        follower.follow(run)
    except Exception:
        _logger.exception("run %s cannot be followed", run.id)
        return False
    return True


def _teller(followers: list[LogFollower]) -> Callable[[RunLog], None]:
    def tell(log: RunLog) -> None:
        nonlocal followers
        for follower in followers:
            try:
                follower.appended(log)
            except Exception:
                _logger.exception("run %s cannot be followed any further", log.run_id)
                followers = [other for other in followers if other is not follower]

    return tell
