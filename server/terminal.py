"""A streamed answer in a terminal: the text as it comes, then TTFB, tokens and tokens per second."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeAlias

import click
import msgspec
import trio

from engine import AgentStopped, Error, Event, GenerationComplete, ReasoningDelta, TextDelta, Usage
from engine.events import TerminalEvent
from engine.usage import estimate_tokens

Opening: TypeAlias = AbstractAsyncContextManager[AsyncIterator[Event]]
"""What starts a run and gives its events; leaving it ends the run (``engine.RunStream``, ``remote.remote_run``)."""

SHORTEST_RATED_SECONDS = 0.1
"""What streams for a shorter time came in one or two bursts: its tokens per second would say nothing."""

_CONTROL_CHARACTERS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


class StreamSummary(msgspec.Struct, frozen=True):
    """What a watched answer came to; times in seconds since the request. ``ending`` is None after Ctrl-C."""

    response: str
    usage: Usage | None
    ttfb: float | None
    elapsed: float
    ending: TerminalEvent | None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the answer."""
        return self.ending is None

    @property
    def failed(self) -> bool:
        """Whether the stream ended otherwise than with a whole answer."""
        return not isinstance(self.ending, GenerationComplete)

    def line(self) -> str:
        """The figures in one line."""
        if self.ttfb is None:
            return f"no token · {self.elapsed:.2f} s"
        counted = self.usage is not None and not self.usage.estimated
        tokens = self.usage.output_tokens if self.usage else estimate_tokens(self.response)
        streamed = self.elapsed - self.ttfb
        rate = f" · {tokens / streamed:.1f} tokens/s" if streamed >= SHORTEST_RATED_SECONDS else ""
        return f"TTFB {self.ttfb:.3f} s · {'' if counted else '~'}{tokens} tokens{rate} · {self.elapsed:.2f} s"


async def show_answer(opening: Opening) -> StreamSummary:
    """Start the run and print the answer's text as it arrives; what the model thinks goes to standard error, dimmed.

    Ctrl-C leaves the run, which stops it, also while there is no connection yet.
    """
    shown = _ShownAnswer(trio.current_time())
    try:
        with interruptible():
            async with opening as events:
                async for event in events:
                    shown.show(event)
    finally:
        shown.end_line()
    return shown.summary()


def show_summary(summary: StreamSummary) -> None:
    """Print how the answer ended, if not well, and the figures, on standard error."""
    match summary.ending:
        case None:
            click.secho("stopped", fg="yellow", err=True)
        case Error(code, content):
            click.secho(f"error {code}: {content}", fg="red", err=True)
        case AgentStopped(reason):
            click.secho(f"stopped: {reason}", fg="yellow", err=True)
    click.secho(summary.line(), dim=True, err=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C cancels what is inside the block, and nothing else; the block then ends as if it were done.

    Python's own KeyboardInterrupt may come up in any task, and out of nurseries in groups. Main thread only.
    """
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        before = signal.signal(signal.SIGINT, lambda *_: token.run_sync_soon(scope.cancel, "Ctrl-C"))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _ShownAnswer:
    """The answer as far as it has been printed."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._ttfb: float | None = None
        self._said: list[str] = []
        self._thinking = False
        self._ending: TerminalEvent | None = None
        # A model, or a stranger's recording, must not drive the terminal; a file or a pipe gets the text as it is.
        self._dropped = _CONTROL_CHARACTERS if sys.stdout.isatty() else {}

    def show(self, event: Event) -> None:
        match event:
            case TextDelta(content):
                self._note_content()
                self._end_thought()
                self._said.append(content)
                click.echo(content.translate(self._dropped), nl=False, color=True)
            case ReasoningDelta(content):
                self._note_content()
                self._thinking = True
                click.secho(content.translate(self._dropped), nl=False, dim=True, err=True)
            case GenerationComplete() | Error() | AgentStopped():
                self._ending = event

    def end_line(self) -> None:
        """What is printed next starts on a line of its own."""
        self._end_thought()
        if self._said and not self._said[-1].endswith("\n"):
            click.echo()

    def summary(self) -> StreamSummary:
        """What it came to, as of now."""
        usage = self._ending.usage if self._ending else None
        elapsed = trio.current_time() - self._started_at
        return StreamSummary("".join(self._said), usage, self._ttfb, elapsed, self._ending)

    def _note_content(self) -> None:
        if self._ttfb is None:
            self._ttfb = trio.current_time() - self._started_at

    def _end_thought(self) -> None:
        if self._thinking:
            self._thinking = False
            click.echo("\n", err=True)
