"""Recordings made for tests: as long as wanted, with as few tokens as will do."""

from __future__ import annotations

from itertools import count

from engine.pieces import FinishPiece, Piece, TextPiece, ToolCallPiece, UsagePiece
from providers.recording import RecordedRead, Recording, RecordingHeader
from server.testing.replay import made_header


def steady_recording(*, first: float = 2.5, gap: float = 0.5, last: float = 93.0) -> Recording:
    """One word each ``gap`` seconds from ``first`` on, the last at ``last``; usage and finish come with it."""
    times = []
    for step in count():
        at = first + step * gap
        if at >= last:
            break
        times.append(at)
    reads = [RecordedRead(round(at * 1e9), (TextPiece(f"word{number} "),)) for number, at in enumerate(times)]
    end = (TextPiece("end."), FinishPiece("stop"), UsagePiece(7, len(times) + 1))
    return Recording(_header("steady"), (*reads, RecordedRead(round(last * 1e9), end)))


def step_recording(*calls: ToolCallPiece, text: str = "", first: float = 1.0, last: float = 2.0) -> Recording:
    """A step of an agent: a text at ``first``, then whole tool calls at ``last``."""
    said = (RecordedRead(round(first * 1e9), (TextPiece(text),)),) if text else ()
    end: tuple[Piece, ...] = (*calls, FinishPiece("tool_calls" if calls else "stop"), UsagePiece(10, 5))
    return Recording(_header("step"), (*said, RecordedRead(round(last * 1e9), end)))


def _header(name: str) -> RecordingHeader:
    return made_header(name, "made for a test", "tests/harness/recordings.py")
