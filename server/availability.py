"""What a request may wait for its store before it is answered 503."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar, TypeVarTuple

import structlog
import trio
from sqlalchemy import Connection

from .errors import RETRY_AFTER_SECONDS, ApiError
from .store.errors import StoreUnavailableError

STORE_SECONDS = 5.0
"""What asking the store who somebody is may take, with the wait for others who ask the same."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_logger = structlog.get_logger("lumos")


class ReadableStore(Protocol):
    """What is asked of ``store.database.Database``."""

    async def read(self, query: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """What the query finds; ``StoreUnavailableError`` if the database cannot answer now."""
        ...


async def or_unavailable(ask: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """What ``ask`` answers within ``STORE_SECONDS``.

    Raises:
        ApiError: 503, if the store cannot answer now.
    """
    try:
        with trio.fail_after(STORE_SECONDS):
            return await ask(*args)
    except (StoreUnavailableError, trio.TooSlowError) as error:
        _logger.warning("store.unavailable", reason=str(error) or "too slow")
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise ApiError(503, "SERVICE_UNAVAILABLE", "the store does not answer", headers=headers) from error
