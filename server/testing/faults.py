"""The fixture ``faults``: what goes wrong, where and when. A method gives something to hand over."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import Piece, ReasoningPiece, TextPiece, ToolCallPiece
from engine.tools import Tool
from providers.recording import RecordedFailure, RecordedRead

from .answers import Answer, Ending, RawAnswer, Refusal, Unreachable
from .client_network import ClientNetwork
from .faulty_tools import HangingTool, RaisingTool
from .tools import as_tool
from .vendor_bytes import Act


class Faults:
    """What goes wrong. Model servers' faults go where answers go: ``add_agent("x", faults.status(429), ...)``.

    ``after`` counts what the model has said by then: reads that brought text, reasoning or a part of a tool call. An
    answer of ``replay.text`` has one for each word. Times are seconds.
    """

    def refuse(self) -> Unreachable:
        """The model server's host refuses the connection."""
        return Unreachable("refuse")

    def never_connects(self) -> Unreachable:
        """The connection is never established."""
        return Unreachable("black hole")

    def never_answers(self) -> RawAnswer:
        """The request is taken, and nothing comes back."""
        return RawAnswer(("hang",))

    def status(self, status: int, *, retry_after: float | None = None, message: str = "refused by a test") -> Refusal:
        """An HTTP error in the vendor's shape: 429 (with ``retry_after`` perhaps), 500, 401 ..."""
        return Refusal(status, message, retry_after)

    def raw(self, *acts: Act) -> RawAnswer:
        """Any bytes instead of an answer, its head included; between them seconds to wait, "close", "reset", "hang"."""
        return RawAnswer(acts)

    def stall(self, answer: Answer, *, after: int, seconds: float = inf) -> Answer:
        """Silence, then on with the rest; without ``seconds`` there is nothing more, and the connection stays open."""
        if seconds == inf:
            return _broken_off(answer, after, "hang")
        cut = _place(answer, after)
        reads = answer.recording.reads
        late = [
            msgspec.structs.replace(read, at_ns=read.at_ns + round(seconds * 1e9), raw=None) for read in reads[cut:]
        ]
        kept = (*_without_raw(reads[:cut]), *(read for read in late if read.pieces))
        return msgspec.structs.replace(answer, recording=msgspec.structs.replace(answer.recording, reads=kept))

    def cut(self, answer: Answer, *, after: int, reset: bool = False) -> Answer:
        """The connection ends in the middle of the answer, by a FIN or an RST."""
        return _broken_off(answer, after, "reset" if reset else "cut")

    def no_end_mark(self, answer: Answer, *, after: int | None = None) -> Answer:
        """The body ends as HTTP ends one, but without the vendor's own end mark; at its very end by default."""
        return _broken_off(answer, after, "whole")

    def error_event(
        self,
        answer: Answer,
        *,
        after: int,
        code: ProviderErrorCode = "upstream.overloaded",
        message: str = "failed by a test",
    ) -> Answer:
        """The vendor reports an error in the stream, in the middle of the answer."""
        return _broken_off(answer, after, "whole", code, message)

    def slow_network(self, latency: float, *, window: int | None = None) -> ClientNetwork:
        """The client's network takes ``latency`` each way, and holds ``window`` unread bytes at the most."""
        return ClientNetwork(latency=latency, window=window)

    def cut_network(self, after_bytes: int, *, reset: bool = False) -> ClientNetwork:
        """The client's connection ends after so many bytes of the response, its head included."""
        return ClientNetwork(cut_after=after_bytes, reset=reset)

    def tool_hangs(self, tool: Tool | Callable[..., Any], seconds: float = inf) -> Tool:
        """The tool, which takes so long before it does anything."""
        return HangingTool(as_tool(tool), seconds)

    def tool_raises(self, tool: Tool | Callable[..., Any], error: Exception | None = None) -> Tool:
        """The tool, which raises instead of doing anything."""
        return RaisingTool(as_tool(tool), error or RuntimeError("raised by a test"))


def _broken_off(
    answer: Answer,
    after: int | None,
    ending: Ending,
    code: ProviderErrorCode = "upstream.truncated",
    message: str = "cut by a test",
) -> Answer:
    """The answer up to there; the header's failure says how it ends, which for this code is without a word."""
    recording = answer.recording
    reads = _without_raw(recording.reads if after is None else recording.reads[: _place(answer, after)])
    failure = RecordedFailure(reads[-1].at_ns if reads else 0, code, message)
    header = msgspec.structs.replace(recording.header, failure=failure)
    return Answer(msgspec.structs.replace(recording, header=header, reads=reads), ending)


def _place(answer: Answer, after: int) -> int:
    """How many reads of the recording there are up to and with that many which said something.

    Raises:
        ValueError: the answer does not say so much.
    """
    said = 0
    for number, read in enumerate(answer.recording.reads):
        if said == after:
            return number
        said += any(_says_something(piece) for piece in read.pieces)
    if said < after:
        raise ValueError(f"the answer says {said} things, so nothing can happen after {after}")
    return len(answer.recording.reads)


def _says_something(piece: Piece) -> bool:
    return isinstance(piece, TextPiece | ReasoningPiece | ToolCallPiece)


def _without_raw(reads: tuple[RecordedRead, ...]) -> tuple[RecordedRead, ...]:
    """What was recorded, to be encoded anew: the recorded bytes would have the end mark in them."""
    return tuple(msgspec.structs.replace(read, raw=None) for read in reads if read.pieces)
