"""What a request may wait for its store before it is answered 503."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import inf
from typing import Protocol, TypeVar, TypeVarTuple

import structlog
import trio
from sqlalchemy import Connection

from .errors import RETRY_AFTER_SECONDS, ApiError
from .store.errors import StoreUnavailableError
from .store.keys import any_keys

STORE_SECONDS = 5.0
"""What asking the store who somebody is may take, with the wait for others who ask the same."""

PROBE_SECONDS = 2.0
"""What the store gets to answer a health check."""

PROBE_KEPT_SECONDS = 2.0
"""How long what a health check found counts for the next ones."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_logger = structlog.get_logger("lumos")


class ReadableStore(Protocol):
    """What is asked of ``store.database.Database``."""

    async def read(self, query: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """What the query finds; ``StoreUnavailableError`` if the database cannot answer now."""
        ...


class _Outage:
    """Logs that the store does not answer, each time, and that it does again, once. A process has one store."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self, reason: str) -> None:
        """It did not answer."""
        _logger.warning("store.unavailable", reason=reason)
        if self._since is None:
            self._since = trio.current_time()

    def end(self) -> None:
        """It answered."""
        if self._since is not None:
            seconds = max(0.0, trio.current_time() - self._since)
            self._since = None
            _logger.info("store.available", after_seconds=round(seconds, 1))


_outage = _Outage()


async def or_unavailable(ask: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """What ``ask`` answers within ``STORE_SECONDS``.

    Raises:
        ApiError: 503, if the store cannot answer now.
    """

    async def in_time() -> T:
        with trio.fail_after(STORE_SECONDS):
            return await ask(*args)

    return await unless_unavailable(in_time)


async def unless_unavailable(ask: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """What ``ask`` answers, which itself limits how long it waits for the store. Raises as ``or_unavailable``."""
    try:
        answer = await ask(*args)
    except (StoreUnavailableError, trio.TooSlowError) as error:
        _outage.begin(str(error) or "too slow")
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise ApiError(503, "SERVICE_UNAVAILABLE", "the store does not answer", headers=headers) from error
    _outage.end()
    return answer


class StoreProbe:
    """Whether the store answers, for health checks: asked seldom, and however many ask, one query is under way."""

    def __init__(self) -> None:
        self._answers = True
        self._ask_again_at = -inf
        self._asking = trio.Lock()

    async def answers(self, store: ReadableStore) -> bool:
        """Whether it answered within ``PROBE_SECONDS``, now or in the last ``PROBE_KEPT_SECONDS``."""
        async with self._asking:
            if trio.current_time() >= self._ask_again_at:
                self._answers = await _answers(store)
                self._ask_again_at = trio.current_time() + PROBE_KEPT_SECONDS
            return self._answers


async def _answers(store: ReadableStore) -> bool:
    try:
        with trio.fail_after(PROBE_SECONDS):
            await store.read(any_keys)  # a table of ours: that the database is there is not enough
    except (StoreUnavailableError, trio.TooSlowError) as error:
        _outage.begin(str(error) or "too slow")
        return False
    _outage.end()
    return True
