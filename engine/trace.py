"""The structured trace of a run: spans for the run, its memory reads, steps, model calls and tool calls."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias

import msgspec

SpanKind: TypeAlias = Literal["run", "memory", "step", "model", "tool"]


class Span(msgspec.Struct, kw_only=True):
    """One timed part of a run. Times are trio's clock; who needs a wall clock reads it when told of the span.

    Attributes:
        span_id: counts up from 1 in its run, whose own span is 1.
        parent_id: the span around it; None for the run's.
        name: the agent, the memory read, the step id, the model, the tool.
        attributes: facts, never a prompt, an answer or a key; some come only with the end.
        error: why it failed, in short; None if it did not.
    """

    run_id: str
    span_id: int
    parent_id: int | None
    kind: SpanKind
    name: str
    started_at: float
    ended_at: float | None = None
    attributes: dict[str, Any] = {}
    error: str | None = None


class TraceCollector(Protocol):
    """Hears of every span twice. Synchronous; must not block, and should not raise: what it raises is logged."""

    def span_started(self, span: Span) -> None:
        """The span has begun; its end may still be to come."""
        ...

    def span_ended(self, span: Span) -> None:
        """The span has its ``ended_at``, its last attributes and its ``error``."""
        ...
