"""Turns that are yet to be kept: who reads their session waits for them, but not for ever."""

from __future__ import annotations

from collections.abc import Hashable

import trio

PENDING_SECONDS = 5.0
"""How long a session's next turn waits for its last one. What is kept later is in the history from then on."""


class _Pending:
    __slots__ = ("count", "over")

    def __init__(self) -> None:
        self.count = 0
        self.over: trio.Event | None = None  # made by who waits for it: hardly ever does anybody


class PendingSaves:
    """What is under way in this process, by session; it holds a session only until its turns are saved, or given up."""

    def __init__(self) -> None:
        self._sessions: dict[Hashable, _Pending] = {}

    def __len__(self) -> int:
        """How many sessions are being saved."""
        return len(self._sessions)

    def hold(self, session: Hashable) -> None:
        """The session's readers wait, until each who holds it has released it once. No reader can slip through."""
        pending = self._sessions.get(session)
        if pending is None:
            pending = self._sessions[session] = _Pending()
        pending.count += 1

    def release(self, session: Hashable) -> None:
        """A turn of the session is kept, or will never be."""
        pending = self._sessions[session]
        pending.count -= 1
        if not pending.count:
            del self._sessions[session]
            if pending.over is not None:
                pending.over.set()

    async def wait_saved(self, session: Hashable, seconds: float = PENDING_SECONDS) -> bool:
        """Wait until nothing of the session is being saved, if anything is; False if that took too long."""
        pending = self._sessions.get(session)
        if pending is None:
            return True
        if pending.over is None:
            pending.over = trio.Event()
        with trio.move_on_after(seconds):
            await pending.over.wait()
            return True
        return False
