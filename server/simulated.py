"""The old way, kept for comparison: generate the whole answer, then cut it up. The cutter is code-point safe."""

from __future__ import annotations

from collections.abc import Iterator

from engine import GenerationComplete, LogEntry, TextDelta
from engine.events import Event, encode_frame
from engine.log import EventLog

from .sse import HEARTBEAT, EventStreamBody, in_pieces

CHUNK_CHARS = 10


def create_streaming_events(entries: list[LogEntry]) -> Iterator[Event]:
    """The events that the old system sent once a run was over: its text in pieces of ten characters."""
    for entry in entries:
        match entry.event:
            case TextDelta():
                continue
            case GenerationComplete(response):
                for start in range(0, len(response), CHUNK_CHARS):
                    yield TextDelta(response[start : start + CHUNK_CHARS], "step-1")
        yield entry.event


class SimulatedBody(EventStreamBody):
    """Says nothing but heartbeats until the run is over, then everything, as fast as it is read.

    Its numbers are its own, and the same whenever it is asked for; after the last one only that comes again.
    """

    def __init__(self, log: EventLog, after: int = 0) -> None:
        super().__init__(log, after=0)
        self._said_before = after
        self._entries: list[LogEntry] = []
        self._said = False

    async def _read_piece(self) -> bytes:
        if self._said:
            return b""
        while entries := await self._log.read(self._after, self._heartbeat_at):
            self._after = entries[-1].seq
            self._entries += entries
        if not self._log.ended:
            return HEARTBEAT
        self._said = True
        events = list(create_streaming_events(self._entries))
        numbered = list(enumerate(events, 1))[min(self._said_before, len(events) - 1) :]
        self._pieces = in_pieces(encode_frame(self._log.run_id, seq, event) for seq, event in numbered)
        return next(self._pieces)
