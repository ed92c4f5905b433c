"""Whose new memories have no vectors yet: filled by runs that end, emptied by a task that the server owns."""

from __future__ import annotations

from collections import OrderedDict

import structlog
import trio

from .embedding_recall import EmbeddingRecall
from .store.errors import StoreUnavailableError
from .store.rows import Scope

WORKERS = 4
"""A vendor that hangs keeps one of them for ``EMBED_SECONDS``, and soon its breaker is open."""

MAX_WAITING = 1000

_logger = structlog.get_logger("lumos")


class EmbeddingBacklog:
    """Each owner once, first come, first served; past ``MAX_WAITING`` the oldest is dropped, until its next run."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Scope, EmbeddingRecall] = OrderedDict()
        self._idle = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """How many owners wait."""
        return len(self._waiting)

    def add(self, scope: Scope, meaning: EmbeddingRecall) -> None:
        """Have vectors made for the owner's new memories. Does not block."""
        self._waiting[scope] = meaning
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        self._idle.unpark()

    async def work(self) -> None:
        """Make vectors until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work)

    async def _work(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            if not self._waiting:
                await self._idle.park()
                continue
            scope, meaning = self._waiting.popitem(last=False)
            try:
                await meaning.embed_new(scope)
            except StoreUnavailableError as error:
                _logger.warning("memory.not_embedded", reason=str(error))
            except Exception:  # vectors are an aid: a bug in making them ends no run and no server
                _logger.exception("memory.embedding_crashed")
