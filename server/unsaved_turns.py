"""Turns that the store did not take when their runs ended: tried again until it does, by a task of the server's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

import structlog
import trio

from engine.memory import TurnRecord

from .pending import PendingSaves
from .store.errors import StoreUnavailableError

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
"""Seconds between attempts: shorter than ``PENDING_SECONDS``, so that a session's next turn sees one while it waits."""

MAX_TURNS = 1000
MAX_CHARS = 64 * 2**20
"""Of all turns' texts. Without a store no new run begins, so only the runs that were under way come here."""

_logger = structlog.get_logger("lumos")


@dataclass(frozen=True)
class _Unsaved:
    session: Hashable
    save: Callable[[], Awaitable[object]]
    chars: int


class UnsavedTurns:
    """A backlog, oldest first; past a bound the oldest is lost. While a turn is in it, its session counts as pending.

    Nothing is tried but where somebody runs ``work()``.
    """

    def __init__(
        self, pending: PendingSaves, *, longest_pause: float = LONGEST_PAUSE, max_turns: int = MAX_TURNS
    ) -> None:
        self._pending = pending
        self._longest_pause = longest_pause
        self._max_turns = max_turns
        self._waiting: OrderedDict[str, _Unsaved] = OrderedDict()
        self._chars = 0
        self._added = trio.lowlevel.ParkingLot()
        self._emptied = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """How many turns wait."""
        return len(self._waiting)

    def add(self, session: Hashable, turn: TurnRecord, save: Callable[[], Awaitable[object]]) -> None:
        """Take over a turn. Does not block.

        Args:
            session: whose readers wait for it.
            turn: what is to be kept.
            save: keeps it; called until it does not raise ``StoreUnavailableError``.
        """
        if turn.run_id in self._waiting:
            return
        self._pending.hold(session)
        self._waiting[turn.run_id] = unsaved = _Unsaved(session, save, _chars(turn))
        self._chars += unsaved.chars
        while len(self._waiting) > self._max_turns or (self._chars > MAX_CHARS and len(self._waiting) > 1):
            self._lose(next(iter(self._waiting)), "too many turns wait to be kept")
        self._added.unpark()

    async def work(self) -> None:
        """Keep turns until cancelled; one at a time, each failure puts the next attempt off."""
        pause = FIRST_PAUSE
        while True:
            await trio.lowlevel.checkpoint()
            if not self._waiting:
                await self._added.park()
            elif await self._try(next(iter(self._waiting))):
                pause = FIRST_PAUSE
            else:
                await trio.sleep(pause)
                pause = min(2 * pause, self._longest_pause)

    async def flush(self, seconds: float) -> None:
        """Wait until all is kept, so long at most; what is left then is lost with the process, and logged."""
        with trio.move_on_after(seconds):
            await trio.lowlevel.checkpoint()
            while self._waiting:
                await self._emptied.park()
        for run_id in list(self._waiting):
            self._lose(run_id, "the server has ended")

    async def _try(self, run_id: str) -> bool:
        unsaved = self._waiting[run_id]
        try:
            await unsaved.save()
        except StoreUnavailableError as error:
            _logger.warning("turn.not_kept_yet", run_id=run_id, reason=str(error), waiting=len(self._waiting))
            if run_id in self._waiting:  # one that cannot be kept does not hold the others
                self._waiting.move_to_end(run_id)
            return False
        except Exception:  # a bug: the turn would fail each time, and this task would end the server
            _logger.exception("turn.crashed", run_id=run_id)
            self._lose(run_id, "it cannot be kept")
            return True
        self._drop(run_id)
        _logger.info("turn.kept_late", run_id=run_id, waiting=len(self._waiting))
        return True

    def _lose(self, run_id: str, reason: str) -> None:
        if self._drop(run_id):
            _logger.error("turn.lost", run_id=run_id, reason=reason)

    def _drop(self, run_id: str) -> bool:
        unsaved = self._waiting.pop(run_id, None)
        if unsaved is None:
            return False
        self._chars -= unsaved.chars
        self._pending.release(unsaved.session)
        if not self._waiting:
            self._emptied.unpark_all()
        return True


def _chars(turn: TurnRecord) -> int:
    calls = (call for message in turn.messages for call in message.tool_calls)
    said = sum(len(message.content) for message in turn.messages)
    return len(turn.response) + said + sum(len(call.arguments) for call in calls)
