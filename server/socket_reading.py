"""How a run is read for a socket: what is there by the time that it has its turn, in pieces of one write each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

import trio

from engine import LogEntry

from .errors import ApiError
from .journal_log import EventsDroppedError
from .run_access import unavailable
from .run_directory import RunHandle
from .socket_messages import End, encode, encode_event
from .sse import PIECE_BYTES
from .store.errors import StoreUnavailableError

TURN_BYTES = 64 * 1024
"""About what one run may write before the others have their turn."""


class Subscription:
    """A run that is being read.

    Attributes:
        after: the number of its last event that was taken for writing.
        left: whether nothing more of it is wanted.
    """

    def __init__(self, run: RunHandle, after: int) -> None:
        self.run = run
        self.after = after
        self.left = False
        self._waiting = trio.CancelScope()

    @property
    def over(self) -> bool:
        """Whether all of the run was taken, to its end."""
        log = self.run.log
        return log.ended and self.after >= log.last_seq

    def leave(self) -> None:
        """Write nothing from now on. What is being written is finished: half a frame would end the socket."""
        self.left = True
        self._waiting.cancel(reason="unsubscribed")

    async def wait_turn(self, turn: trio.Lock) -> list[LogEntry] | None:
        """Wait until there is something to write, then for the turn, the caller's to release. None: it has left.

        Raises:
            ApiError: the events are not to be had, or not now.
        """
        if self.left:
            return None
        with trio.CancelScope() as self._waiting:  # noqa: ASYNC912 - the log may have something already
            entries = await self._read()
            await turn.acquire()
            return entries
        return None

    async def more(self) -> list[LogEntry]:
        """What is there by now of a run under way. Raises as ``wait_turn``."""
        return [] if self.run.log.ended else await self._read(trio.current_time())

    def pieces(self, entries: Sequence[LogEntry]) -> Iterator[list[str]]:
        """The entries of one turn as messages, to be written piece by piece; after the run's last one its ``end``.

        A piece has at most ``PIECE_BYTES`` of events, or one larger event.
        """
        messages: list[str] = []
        size = 0
        for entry in _of_one_turn(entries):
            if messages and size + len(entry.frame) > PIECE_BYTES:
                yield messages
                messages, size = [], 0
            messages.append(encode_event(self.run.run_id, entry))
            size += len(entry.frame)
            self.after = entry.seq
        if self.over:
            messages.append(encode(End(run_id=self.run.run_id)))
        if messages:
            yield messages

    async def _read(self, deadline: float = inf) -> list[LogEntry]:
        try:
            return await self.run.log.read(self.after, deadline)
        except EventsDroppedError as error:
            raise ApiError(410, "GONE", "the run's events are no longer kept; its state is") from error
        except (trio.BrokenResourceError, trio.TooSlowError, StoreUnavailableError) as error:
            raise unavailable("the run's events cannot be had now: subscribe again") from error


def _of_one_turn(entries: Sequence[LogEntry]) -> Iterator[LogEntry]:
    size = 0
    for entry in entries:
        if size >= TURN_BYTES:
            return
        size += len(entry.frame)
        yield entry
