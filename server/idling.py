"""Closes connections that wait too long for a request: one task for all, where each would have a timer of its own."""

from __future__ import annotations

from typing import Protocol

import trio


class Idler(Protocol):
    """A connection."""

    def end(self, reason: str) -> None:
        """Close it. Synchronous; must not raise."""
        ...


class Idling:
    """The connections without a request under way. All may wait equally long, so who came first is due first."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: dict[Idler, float] = {}
        self._came = trio.lowlevel.ParkingLot()

    def add(self, idler: Idler) -> None:
        """Its time runs from now on."""
        self._due.pop(idler, None)  # the order is that of time
        self._due[idler] = trio.current_time() + self._seconds
        if self._came:
            self._came.unpark_all()

    def discard(self, idler: Idler) -> None:
        """It has something to do, or is closed."""
        self._due.pop(idler, None)

    def end_all(self, reason: str) -> None:
        """Close all of them, now."""
        for idler in self._due:
            idler.end(reason)

    async def run(self) -> None:
        """Close who is due, until cancelled."""
        while True:
            while self._due:
                idler, due = next(iter(self._due.items()))
                if trio.current_time() < due:
                    await trio.sleep_until(due)
                else:
                    del self._due[idler]
                    idler.end("it was idle for too long")
            await self._came.park()
