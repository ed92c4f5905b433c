"""How many runs a worker takes at once: a bounded number, a short and bounded queue before it, 503 past that.

The queue is first come, first served; a place that becomes free is handed to the one that waits longest, so nobody who
comes later overtakes. A key has a share of the queue, so that one cannot fill it; its runs at once are ``limits``'.
"""

from __future__ import annotations

from collections import Counter
from math import ceil

import msgspec
import trio

from .errors import RETRY_AFTER_SECONDS, ApiError, draining


class AdmissionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker takes.

    Attributes:
        runs: under way at once.
        queue: starts that wait for a place.
        queue_seconds: how long they wait at most.
        key_queue: the part of the queue that one API key may take, 0 to 1; always room for one.
    """

    runs: int = 1000
    queue: int = 100
    queue_seconds: float = 5.0
    key_queue: float = 0.25


class Place:
    """The place of one run among those of the worker. Given back once, however often it is closed."""

    __slots__ = ("_admission", "_open")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._open = True

    def close(self) -> None:
        """Give the place back."""
        if self._open:
            self._open = False
            self._admission.give_back()


class _Waiting:
    """A start in the queue."""

    def __init__(self, key_id: str | None) -> None:
        self.key_id = key_id
        self.has_place = False
        self.called = trio.Event()


class Admission:
    """Counts the runs of this worker.

    Attributes:
        refused: how many starts were refused, since the beginning.
    """

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self.refused = 0
        self._taken = 0
        self._closed = False
        self._queue: dict[_Waiting, None] = {}  # a dict keeps the order and forgets from the middle
        self._queued_of: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self._taken

    @property
    def queued(self) -> int:
        """How many starts wait for a place."""
        return len(self._queue)

    @property
    def saturated(self) -> bool:
        """Whether the next start would have to wait, or be refused."""
        return self._taken >= self.limits.runs

    async def enter(self, key_id: str | None) -> Place:
        """Take a place, the caller's to close or to hand to its run; wait for one if all are taken.

        Raises:
            ApiError: 503 with ``Retry-After``: the queue, or the key's share of it, is full, the wait was too long, or
                the server is shutting down.
        """
        if self._closed:
            raise self._shutting_down()
        if not self.saturated:
            self._taken += 1
            return Place(self)
        self._check_queue(key_id)
        if not await self._wait(key_id):
            if self._closed:
                raise self._shutting_down()
            raise self._refusal("the server is busy, and no run ended in time")
        return Place(self)

    def give_back(self) -> None:
        """For ``Place.close``: one place is free again, or rather the next one's."""
        if not self._queue:
            self._taken -= 1
            return
        first = next(iter(self._queue))
        self._leave_queue(first)
        first.has_place = True
        first.called.set()

    def close(self) -> None:
        """Refuse all who wait, now, and all who still come: the server is shutting down."""
        self._closed = True
        for waiting in tuple(self._queue):
            self._leave_queue(waiting)
            waiting.called.set()

    async def _wait(self, key_id: str | None) -> bool:
        """Wait in the queue; whether a place was got."""
        waiting = _Waiting(key_id)
        self._queue[waiting] = None
        if key_id is not None:
            self._queued_of[key_id] += 1
        try:
            with trio.move_on_after(self.limits.queue_seconds):
                await waiting.called.wait()
        except BaseException:
            if waiting.has_place:  # given and taken away in the same moment
                self.give_back()
            raise
        finally:
            self._leave_queue(waiting)
        return waiting.has_place

    def _leave_queue(self, waiting: _Waiting) -> None:
        if waiting in self._queue:
            del self._queue[waiting]
            if waiting.key_id is not None:
                self._queued_of[waiting.key_id] -= 1
                if not self._queued_of[waiting.key_id]:
                    del self._queued_of[waiting.key_id]

    def _check_queue(self, key_id: str | None) -> None:
        if len(self._queue) >= self.limits.queue:
            raise self._refusal("the server is busy, and its queue is full")
        share = max(1, ceil(self.limits.queue * self.limits.key_queue))
        if key_id is not None and self._queued_of[key_id] >= share:
            raise self._refusal("the server is busy, and this key has too many requests in its queue")

    def _shutting_down(self) -> ApiError:
        self.refused += 1
        return draining()

    def _refusal(self, message: str) -> ApiError:
        self.refused += 1
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        details = {"retry_after": RETRY_AFTER_SECONDS}
        return ApiError(503, "SERVICE_UNAVAILABLE", message, details, headers)
