"""A streamed answer in a terminal: the text as it comes, then TTFB, tokens and tokens per second."""

from __future__ import annotations

from collections.abc import AsyncIterator

import click
import msgspec
import trio

from engine import AgentStopped, Error, Event, GenerationComplete, ReasoningDelta, TextDelta, Usage
from engine.usage import estimate_tokens


class StreamSummary(msgspec.Struct, frozen=True):
    """What a watched stream came to; times in seconds since the request."""

    response: str
    usage: Usage | None
    ttfb: float | None
    elapsed: float
    ending: Event | None

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
        rate = f" · {tokens / streamed:.1f} tokens/s" if streamed > 0 and tokens > 1 else ""
        return f"TTFB {self.ttfb:.3f} s · {'' if counted else '~'}{tokens} tokens{rate} · {self.elapsed:.2f} s"


async def show_stream(events: AsyncIterator[Event], started_at: float) -> StreamSummary:
    """Print the answer's text as it arrives; reasoning goes to standard error, dimmed. ``started_at``: trio's clock."""
    ttfb: float | None = None
    said: list[str] = []
    ending: Event | None = None
    usage: Usage | None = None
    async for event in events:
        if ttfb is None and isinstance(event, TextDelta | ReasoningDelta):
            ttfb = trio.current_time() - started_at
        match event:
            case TextDelta(content):
                said.append(content)
                click.echo(content, nl=False)
            case ReasoningDelta(content):
                click.secho(content, nl=False, dim=True, err=True)
            case GenerationComplete() | Error() | AgentStopped():
                ending, usage = event, event.usage
    return StreamSummary("".join(said), usage, ttfb, trio.current_time() - started_at, ending)


def show_summary(summary: StreamSummary) -> None:
    """Print the figures, and the error if there was one, on standard error, after the text."""
    click.echo()
    match summary.ending:
        case Error(code, content):
            click.secho(f"error {code}: {content}", fg="red", err=True)
        case AgentStopped(reason):
            click.secho(f"stopped: {reason}", fg="yellow", err=True)
    click.secho(summary.line(), dim=True, err=True)
