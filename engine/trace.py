"""The structured trace of a run: spans for the run, its memory reads, steps, model calls and tool calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

import msgspec
import trio

SpanKind: TypeAlias = Literal["run", "memory", "step", "model", "tool"]

CANCELLED = "cancelled"
NOT_ENDED = "not ended"

_logger = logging.getLogger(__name__)


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


_NO_SPAN = Span(run_id="", span_id=0, parent_id=None, kind="run", name="", started_at=0.0, ended_at=0.0)
_NO_SPANS: AbstractContextManager[Span] = nullcontext(_NO_SPAN)


class _SpanBlock:
    """The block of a span; ``contextmanager`` would be 3 µs more."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    def __enter__(self) -> Span:
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._tracer.end(self._span, None if reason is None else error_name(reason))


class Tracer:
    """Makes the spans of one run and tells the collector of them.

    Without a collector every span is one shared dummy, and nothing is measured. A collector that raises is logged once
    a run and told of the next span all the same; the run never notices.
    """

    __slots__ = ("_clock", "_collector", "_complained", "_open", "_run_id", "_spans")

    def __init__(self, run_id: str, collector: TraceCollector | None) -> None:
        self._run_id = run_id
        self._collector = collector
        self._clock = trio.lowlevel.current_clock()
        self._open: list[Span] = []  # in the order of their begin: a parent before its children
        self._spans = 0
        self._complained = False

    def begin(self, kind: SpanKind, name: str, parent: Span | None = None, **attributes: Any) -> Span:
        """Begin a span under ``parent``; without one, under the run's own span, which is the first. End it."""
        if self._collector is None:
            return _NO_SPAN
        self._spans += 1
        span = Span(
            run_id=self._run_id,
            span_id=self._spans,
            parent_id=(None if self._spans == 1 else 1) if parent is None else parent.span_id,
            kind=kind,
            name=name,
            started_at=self._clock.current_time(),
            attributes=attributes,
        )
        self._open.append(span)
        try:
            self._collector.span_started(span)
        except Exception as bug:  # noqa: BLE001 - logged
            self._complain(bug)
        return span

    def note(self, span: Span, **attributes: Any) -> None:
        """Add attributes to an open span; the collector sees them at its end. An ended span is left alone."""
        if span.ended_at is None:
            span.attributes.update(attributes)

    def end(self, span: Span, error: str | None = None, **attributes: Any) -> None:
        """End it; ``error`` says in short why it failed. Nothing happens if it has ended.

        What is still open under it is ended first, with the error ``NOT_ENDED``.
        """
        if self._collector is None or span.ended_at is not None:
            return
        if self._open[-1] is not span:
            for child in self._open_under(span):
                self._end(child, NOT_ENDED, self._collector)
        span.attributes.update(attributes)
        self._end(span, error, self._collector)

    def span(
        self, kind: SpanKind, name: str, parent: Span | None = None, **attributes: Any
    ) -> AbstractContextManager[Span]:
        """A span around a block. What the block raises ends it with the class's name as its error, and goes on."""
        if self._collector is None:
            return _NO_SPANS
        return _SpanBlock(self, self.begin(kind, name, parent, **attributes))

    def _open_under(self, span: Span) -> list[Span]:
        """The span's open descendants, the youngest first: children come after their parents."""
        family = {span.span_id}
        for candidate in self._open:
            if candidate.parent_id in family:
                family.add(candidate.span_id)
        return [one for one in reversed(self._open) if one.span_id in family and one is not span]

    def _end(self, span: Span, error: str | None, collector: TraceCollector) -> None:
        self._open.remove(span)
        span.ended_at = self._clock.current_time()
        span.error = error
        try:
            collector.span_ended(span)
        except Exception as bug:  # noqa: BLE001 - logged
            self._complain(bug)

    def _complain(self, bug: Exception) -> None:
        if not self._complained:
            self._complained = True
            text = "the trace collector failed at run %s; it is told of the rest"
            _logger.error(text, self._run_id, exc_info=bug)


def error_name(reason: BaseException) -> str:
    """What a span calls it: ``cancelled``, else its ``code`` or its class; a group is called by its first failure."""
    if isinstance(reason, BaseExceptionGroup):
        _, failures = reason.split(trio.Cancelled)
        return CANCELLED if failures is None else error_name(failures.exceptions[0])
    if isinstance(reason, trio.Cancelled):
        return CANCELLED
    code = getattr(reason, "code", None)
    return code if isinstance(code, str) else type(reason).__name__


class EachOf:
    """A collector that tells several, in order. One that raises keeps the others from nothing."""

    def __init__(self, *collectors: TraceCollector) -> None:
        self._collectors = collectors

    def span_started(self, span: Span) -> None:
        """Tell each. Raises an ``ExceptionGroup`` of what they raised."""
        _call_each([collector.span_started for collector in self._collectors], span)

    def span_ended(self, span: Span) -> None:
        """Tell each. Raises an ``ExceptionGroup`` of what they raised."""
        _call_each([collector.span_ended for collector in self._collectors], span)


def _call_each(listeners: Iterable[Callable[[Span], None]], span: Span) -> None:
    failures = []
    for listener in listeners:
        try:
            listener(span)
        except Exception as failure:  # noqa: BLE001 - raised below
            failures.append(failure)
    if failures:
        raise ExceptionGroup("trace collectors failed", failures)


class KindStats(msgspec.Struct, frozen=True):
    """What the spans of one kind have in common. Durations are of the ended ones, in seconds; 0 if there are none."""

    spans: int
    open: int
    errors: int
    mean_seconds: float
    max_seconds: float


class TraceStats(msgspec.Struct, frozen=True):
    """What is kept at the moment. ``dropped`` counts the spans beyond the bound of their run, of the runs kept."""

    runs: int
    dropped: int
    kinds: dict[SpanKind, KindStats]


class InMemoryTraces:
    """A collector that keeps the spans of the latest runs, to look at. For one event loop.

    Holds at most ``max_runs`` runs, the oldest dropped, and of each its first ``max_spans`` spans.
    """

    def __init__(self, max_runs: int = 1000, max_spans: int = 1000) -> None:
        if max_runs < 1 or max_spans < 1:
            raise ValueError("max_runs and max_spans are at least 1")
        self._max_runs = max_runs
        self._max_spans = max_spans
        self._runs: dict[str, list[Span]] = {}
        self._dropped: dict[str, int] = {}

    def span_started(self, span: Span) -> None:
        """Keep it: it is read again after its end."""
        if span.parent_id is None:
            self._make_room()
            self._runs.setdefault(span.run_id, [])
        spans = self._runs.get(span.run_id)
        if spans is None:  # its run has been dropped
            return
        if len(spans) < self._max_spans:
            spans.append(span)
        else:
            self._dropped[span.run_id] = self._dropped.get(span.run_id, 0) + 1

    def span_ended(self, span: Span) -> None:
        """Nothing to do: the span kept is this one."""

    def trace(self, run_id: str) -> list[Span]:
        """The spans of a run in the order of their begin, the run's first; empty for a run not kept."""
        return list(self._runs.get(run_id, ()))

    def search(
        self,
        *,
        kind: SpanKind | None = None,
        name: str | None = None,
        failed: bool | None = None,
        limit: int = 100,
    ) -> list[Span]:
        """The latest ``limit`` spans of that kind and name that failed or did not, of the newest run first."""
        return list(islice(self._matching(kind, name, failed), limit))

    def stats(self) -> TraceStats:
        """Count and time what is kept."""
        kinds: dict[SpanKind, list[Span]] = {}
        for span in self._all():
            kinds.setdefault(span.kind, []).append(span)
        return TraceStats(
            len(self._runs), sum(self._dropped.values()), {kind: _kind_stats(spans) for kind, spans in kinds.items()}
        )

    def as_tree(self, run_id: str) -> dict[str, Any] | None:
        """The run's span as a plain dict, those under it in its ``children``; None for a run not kept.

        ``start_ms`` counts from the run's start; ``duration_ms`` is None while a span is open.
        """
        spans = self._runs.get(run_id)
        if not spans:
            return None
        nodes = {span.span_id: _node(span, spans[0].started_at) for span in spans}
        for span in spans[1:]:
            nodes[span.parent_id or spans[0].span_id]["children"].append(nodes[span.span_id])
        return {"run_id": run_id, "dropped": self._dropped.get(run_id, 0), **nodes[spans[0].span_id]}

    def _make_room(self) -> None:
        while len(self._runs) >= self._max_runs:
            oldest = next(iter(self._runs))
            del self._runs[oldest]
            self._dropped.pop(oldest, None)

    def _all(self) -> Iterator[Span]:
        for spans in reversed(self._runs.values()):
            yield from reversed(spans)

    def _matching(self, kind: SpanKind | None, name: str | None, failed: bool | None) -> Iterator[Span]:
        for span in self._all():
            if (
                (kind is None or span.kind == kind)
                and (name is None or span.name == name)
                and (failed is None or (span.error is not None) == failed)
            ):
                yield span


def _node(span: Span, run_started_at: float) -> dict[str, Any]:
    ended_at = span.ended_at
    return {
        "kind": span.kind,
        "name": span.name,
        "start_ms": milliseconds(span.started_at - run_started_at),
        "duration_ms": None if ended_at is None else milliseconds(ended_at - span.started_at),
        "error": span.error,
        "attributes": dict(span.attributes),
        "children": [],
    }


def _kind_stats(spans: Iterable[Span]) -> KindStats:
    spans = list(spans)
    durations = [span.ended_at - span.started_at for span in spans if span.ended_at is not None]
    return KindStats(
        spans=len(spans),
        open=len(spans) - len(durations),
        errors=sum(span.error is not None for span in spans),
        mean_seconds=sum(durations) / len(durations) if durations else 0.0,
        max_seconds=max(durations, default=0.0),
    )


def milliseconds(seconds: float) -> float:
    """Seconds as milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)
