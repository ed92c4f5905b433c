"""The fixture ``replay``: what a model says, from a recording or written in place."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import msgspec

from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.recording import FORMAT, RecordedRead, Recording, RecordingHeader, load, names
from providers.replay import step_names

from .answers import Answer

Said: TypeAlias = str | Piece
"""What a read brings: text, or a piece of ``engine.pieces``."""


class Replay:
    """Makes answers of a model; times are seconds from the request.

    ``replay("gpt4o-13s")`` is a packaged recording, ``replay("answers/hello.jsonl")`` one of ``lumos record``.
    """

    def __call__(self, source: str | os.PathLike[str]) -> Answer:
        """A recording by its name, if it is packaged (``lumos replay --list``), or by its file.

        Raises:
            RecordingError: there is none, or it is not valid.
            OSError: the file cannot be read.
        """
        return Answer(load(source))

    def steps(self, name: str) -> tuple[Answer, ...]:
        """All steps of a packaged recording, as ``demo-tools`` has two: for ``add_agent("x", *replay.steps(...))``."""
        return tuple(map(self, step_names(name, names()))) or (self(name),)

    def text(
        self,
        text: str,
        *,
        first: float = 0.5,
        every: float = 0.05,
        reasoning: str = "",
        usage: tuple[int, int] | None = None,
        finish: FinishReason = "stop",
    ) -> Answer:
        """Say the text word by word, after the reasoning, a word each ``every`` seconds from ``first`` on.

        ``usage`` is input and output tokens; by default ten and one for each word.
        """
        pieces: list[Piece] = [ReasoningPiece(word) for word in _words(reasoning)]
        pieces += [TextPiece(word) for word in _words(text)]
        timed = [(first + number * every, piece) for number, piece in enumerate(pieces)]
        return self.script(*timed, usage=usage or (10, len(pieces)), finish=finish)

    def tool_call(
        self, name: str, arguments: Mapping[str, Any] | str | None = None, *, text: str = "", at: float = 0.5
    ) -> Answer:
        """Call one tool, after some text perhaps; see ``tool_calls``."""
        return self.tool_calls((name, arguments), text=text, at=at)

    def tool_calls(self, *calls: tuple[str, Mapping[str, Any] | str | None], text: str = "", at: float = 0.5) -> Answer:
        """Call these tools side by side: names and arguments, which may be text that is no JSON.

        What the model says once it has their results is the next answer of the agent.
        """
        pieces: list[Piece] = [TextPiece(text)] if text else []
        for index, (name, arguments) in enumerate(calls):
            fragment = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments or {}).decode()
            pieces.append(ToolCallPiece(index, f"call_{index + 1}", name, fragment))
        return self.script(*((at, piece) for piece in pieces), usage=(10, 5), finish="tool_calls")

    def script(
        self, *said: tuple[float, Said], usage: tuple[int, int] | None = None, finish: FinishReason = "stop"
    ) -> Answer:
        """Say each thing at its time, as ``replay.script((0.5, "Hello"), (1.0, " world"))``; then finish.

        Raises:
            RecordingError: times go back.
        """
        reads = [(at, _piece(what)) for at, what in said]
        end: list[Piece] = [FinishPiece(finish)]
        if usage is not None:
            end.append(UsagePiece(*usage))
        last = reads[-1][0] if reads else 0.5
        return Answer(
            Recording(
                made_header("in-place", "written in a test", "a test", licence="none"),
                tuple(_joined([*reads, *((last, piece) for piece in end)])),
            )
        )


def _words(text: str) -> list[str]:
    """The text cut before each word but the first, nothing lost."""
    return re.findall(r"^\s*\S+|\s+\S*", text)


def _piece(said: Said) -> Piece:
    return TextPiece(said) if isinstance(said, str) else said


def _joined(timed: Iterable[tuple[float, Piece]]) -> Iterator[RecordedRead]:
    """One read for all that comes at the same time."""
    at_ns, pieces = 0, list[Piece]()
    for at, piece in timed:
        if pieces and round(at * 1e9) != at_ns:
            yield RecordedRead(at_ns, tuple(pieces))
            pieces = []
        at_ns = round(at * 1e9)
        pieces.append(piece)
    yield RecordedRead(at_ns, tuple(pieces))


def made_header(name: str, title: str, source: str, *, licence: str = "MIT") -> RecordingHeader:
    """The header of a recording that nobody recorded; ``source`` is who made it."""
    return RecordingHeader(
        format=FORMAT,
        name=name,
        title=title,
        provider="none",
        model="none",
        recorded=datetime.date(2026, 11, 22),
        source=source,
        licence=licence,
        prompt="",
    )
