"""What one API key may use: requests a minute, runs at once, tokens a day. Counted in this process's memory.

Requests are a bucket that holds a minute's worth and fills evenly: a burst of all of them, then one each
``60 / requests_per_minute`` seconds. A key's bucket is one number (GCRA: when its next request would be due if they
came evenly), and a full bucket is none at all, so memory holds the keys that asked in the last minute.

Tokens are counted as runs end, so runs that are under way together may go over what is left of the day. A day is UTC's.
The store is asked once for each key in a process, when its first run starts; from then on its runs are counted here.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from math import ceil, inf

import trio

from engine import Run, Usage
from engine.run import utc_now

from .availability import ReadableStore, or_unavailable
from .errors import RETRY_AFTER_SECONDS, ApiError
from .principal import Principal
from .store.times import time_text
from .store.turns import tokens_used_since

WINDOW_SECONDS = 60.0

_ROUNDING = 1e-6
"""Seconds that sums of floats may be off; what is due within them is due."""


class RunSlot:
    """The place of one run among those of its key. Given back once, however often it is closed.

    It is the run's from ``RunSpec.on_ended=slot.run_ended`` on; if the run cannot be started after all, ``close`` it.
    """

    __slots__ = ("_limiter", "_open", "key_id")

    def __init__(self, limiter: KeyLimiter, key_id: str | None) -> None:
        self.key_id = key_id
        self._limiter = limiter
        self._open = True

    def run_ended(self, run: Run) -> None:
        """Give the place back and count the run's tokens; for ``RunSpec.on_ended``."""
        if self._open:
            self._limiter.spend(self.key_id, run.usage)
        self.close()

    def close(self) -> None:
        """Give the place back."""
        if self._open:
            self._open = False
            self._limiter.give_back(self.key_id)


class _Day:
    """What a key has used of a day."""

    def __init__(self, start: datetime, tokens: int) -> None:
        self.start = start
        self.tokens = tokens


class KeyLimiter:
    """Counts for all keys of this process; the local user, who has no key, has no limits."""

    def __init__(self, store: ReadableStore, wall_clock: Callable[[], datetime] = utc_now) -> None:
        self._store = store
        self._wall_clock = wall_clock
        self._due: dict[str, float] = {}
        self._sweep_at = -inf
        self._runs: dict[str, int] = {}
        self._days: dict[str, _Day] = {}
        self._reading = trio.Lock()

    def count_request(self, principal: Principal) -> None:
        """Count one request. A refused one does not count, so that a client that waits as told is let in.

        Raises:
            ApiError: 429 with ``Retry-After``.
        """
        if principal.key_id is None:
            return
        now = trio.current_time()
        self._sweep(now)
        limit = principal.limits.requests_per_minute
        if limit == inf:
            return
        interval = WINDOW_SECONDS / limit
        due = max(self._due.get(principal.key_id, now), now) + interval
        wait = due - now - max(WINDOW_SECONDS, interval)
        if wait > _ROUNDING:
            raise _too_many(f"this key may make {_counted(limit, 'request')} a minute", wait)
        self._due[principal.key_id] = due

    def run_slot(self, principal: Principal) -> RunSlot:
        """Take the place of one run, see ``RunSlot``.

        Raises:
            ApiError: 429 with ``Retry-After``: nobody knows when a run ends.
        """
        key_id = principal.key_id
        if key_id is not None:
            limit = principal.limits.concurrent_runs
            running = self._runs.get(key_id, 0)
            if running >= limit:
                raise _too_many(f"this key may have {_counted(limit, 'run')} at once", RETRY_AFTER_SECONDS)
            self._runs[key_id] = running + 1
        return RunSlot(self, key_id)

    def give_back(self, key_id: str | None) -> None:
        """For ``RunSlot.close``: one place of the key's is free again."""
        if key_id is not None:
            self._runs[key_id] -= 1
            if not self._runs[key_id]:
                del self._runs[key_id]

    async def check_tokens(self, principal: Principal) -> None:
        """Whether the key may start another run today.

        Raises:
            ApiError: 429 with ``Retry-After``, the seconds to midnight UTC; 503 while the store does not answer.
        """
        limit = principal.limits.tokens_per_day
        if principal.key_id is None or limit == inf:
            return
        if principal.key_id not in self._days:
            await or_unavailable(self._read_day, principal.key_id)
        now = self._wall_clock()
        if self._day(principal.key_id, now).tokens >= limit:
            to_midnight = (_midnight(now) + timedelta(days=1) - now).total_seconds()
            raise _too_many(f"this key has used up its {_counted(limit, 'token')} of today", to_midnight)

    def spend(self, key_id: str | None, usage: Usage | None) -> None:
        """Count what a run used, if the key's day is being counted; else the store will tell of it."""
        if key_id in self._days and usage is not None:
            self._day(key_id, self._wall_clock()).tokens += usage.input_tokens + usage.output_tokens

    async def _read_day(self, key_id: str) -> None:
        """Ask the store what the key used today; one request does, before any run of the key's can end here."""
        async with self._reading:
            if key_id not in self._days:
                start = _midnight(self._wall_clock())
                since = time_text(start)
                used = await self._store.read(tokens_used_since, key_id, since)
                self._days[key_id] = _Day(start, used)

    def _day(self, key_id: str, now: datetime) -> _Day:
        """The key's day, begun anew after midnight: whatever ends from then on, ends here."""
        day = self._days[key_id]
        if day.start < _midnight(now):
            day = self._days[key_id] = _Day(_midnight(now), 0)
        return day

    def _sweep(self, now: float) -> None:
        """Once a minute, forget full buckets, and days that are over and have no run that would still count."""
        if now < self._sweep_at:
            return
        self._sweep_at = now + WINDOW_SECONDS
        self._due = {key_id: due for key_id, due in self._due.items() if due > now}
        today = _midnight(self._wall_clock())
        self._days = {k: day for k, day in self._days.items() if day.start >= today or k in self._runs}


def _counted(limit: float, what: str) -> str:
    return f"{limit:.15g} {what}{'' if limit == 1 else 's'}"


def _midnight(now: datetime) -> datetime:
    return datetime.combine(now.astimezone(UTC).date(), time(), UTC)


def _too_many(message: str, wait: float) -> ApiError:
    seconds = max(1, ceil(wait - _ROUNDING / 2))
    return ApiError(429, "RATE_LIMITED", message, {"retry_after": seconds}, {"Retry-After": str(seconds)})
