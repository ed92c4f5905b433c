"""For tests on real sockets: a task that waits for all of them, as a server has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from providers.readiness import Readiness, share_readiness


@asynccontextmanager
async def sharing() -> AsyncIterator[Readiness | None]:
    """While the block runs, one task reads for all who wait; None where a system has no epoll."""
    with share_readiness() as readiness:
        async with trio.open_nursery() as nursery:
            if readiness is not None:
                nursery.start_soon(readiness.run)
            yield readiness
            nursery.cancel_scope.cancel()
