"""The old way, kept for comparison: generate the whole answer, then cut it up. The cutter is code-point safe."""

from __future__ import annotations

from collections.abc import Iterator

from engine import GenerationComplete, LogEntry, RunLog, TextDelta
from engine.events import Event, encode_frame

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
    """Says nothing but heartbeats until the run is over, then everything, as fast as it is read."""

    _log: RunLog

    def __init__(self, log: RunLog) -> None:
        super().__init__(log, after=0)
        self._said = False

    async def _read_piece(self) -> bytes:
        if self._said:
            raise StopAsyncIteration
        while entries := await self._log.read(self._after, self._heartbeat_at):
            self._after = entries[-1].seq
        if not self._log.ended:
            return HEARTBEAT
        self._said = True
        events = create_streaming_events(self._log.entries())
        self._pieces = in_pieces(encode_frame(self._log.run_id, seq, event) for seq, event in enumerate(events, 1))
        return next(self._pieces)
