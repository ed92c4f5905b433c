"""Runs as OpenTelemetry traces, under the names of its conventions for generative AI. An optional extra: ``otel``."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import trio

from engine.trace import Span, SpanKind

from .otel_export import TellingExporter, heard_alone, shut_down

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import TracerProvider

INSTRUMENTATION = "lumos"
MAX_TEXT_CHARS = 256
MAX_OPEN_RUNS = 10_000
"""Runs whose traces are under way at a time; those begun beyond are not told."""

OPERATIONS: Mapping[SpanKind, str] = {"run": "invoke_agent", "model": "chat", "tool": "execute_tool"}
"""What the conventions call them. They know nothing of steps and memory reads, which are named as they are."""

ATTRIBUTES: Mapping[str, str] = {
    "agent_id": "gen_ai.agent.id",
    "answered_by": "gen_ai.provider.name",  # comes with the end, and knows better than ``provider``
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "call_id": "gen_ai.tool.call.id",
    "finish_reason": "gen_ai.response.finish_reasons",
    "input_tokens": "gen_ai.usage.input_tokens",
    "max_tokens": "gen_ai.request.max_tokens",
    "model": "gen_ai.request.model",
    "output_tokens": "gen_ai.usage.output_tokens",
    "provider": "gen_ai.provider.name",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
    "response_model": "gen_ai.response.model",
    "session_id": "gen_ai.conversation.id",
    "temperature": "gen_ai.request.temperature",
}
"""The engine's plain names and the conventions'; other attributes are told as ``lumos.`` and their name.

Written out, not imported: the conventions for AI have left the package opentelemetry-semantic-conventions, which keeps
their constants as deprecated ones.
"""

PROVIDERS: Mapping[str, str] = {
    "azure": "azure.ai.openai",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "openai_responses": "openai",
}
"""Providers that the conventions name otherwise than the registry."""

_LOW_CARDINALITY = re.compile(r"[A-Za-z0-9_.]{1,64}")
_OTHER_ERROR = "_OTHER"
_MISSING = "OpenTelemetry traces need their packages: pip install 'lumos-stream[otel]'"


class OpenTelemetryMissingError(ImportError):
    """The packages of the extra are not installed."""


@contextmanager
def exporting_traces() -> Iterator[OpenTelemetryCollector]:
    """A collector whose traces go out by OTLP over HTTP, to where ``OTEL_EXPORTER_OTLP_ENDPOINT`` and its like say.

    A thread of OpenTelemetry's sends them. Leaving the block sends what is left, and blocks for as long as that takes,
    ``otel_export.SHUTDOWN_SECONDS`` at most and a little.

    Raises:
        OpenTelemetryMissingError: the extra ``otel`` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise OpenTelemetryMissingError(_MISSING) from error
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": INSTRUMENTATION}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    with heard_alone() as last_error:
        exporter = TellingExporter(OTLPSpanExporter(), last_error)
        provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", exporter)))
        try:
            yield OpenTelemetryCollector(provider)
        finally:
            shut_down(provider, exporter)


class _OpenRun:
    """The spans of a run that have begun, and the wall-clock nanosecond at which trio's clock would have been 0."""

    def __init__(self) -> None:
        self.clock_zero = time.time_ns() - _nanoseconds(trio.current_time())
        self.spans: dict[int, OtelSpan] = {}

    def wall_time(self, moment: float) -> int:
        """Within a run, durations are exact even if somebody sets the wall clock."""
        return self.clock_zero + _nanoseconds(moment)


class OpenTelemetryCollector:
    """A trace collector that makes a trace of each run, with the run's span at its root.

    A run's span becomes the child of the span that is current where the run was started, if there is one. Spans never
    become current themselves: parents are given explicitly, so that runs at the same time do not mix.

    Exporting must not block the event loop: give a provider whose processor does it elsewhere (``BatchSpanProcessor``,
    not ``SimpleSpanProcessor``). The provider is its maker's to shut down.

    Raises:
        OpenTelemetryMissingError: the extra ``otel`` is not installed.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        """Without a provider, the global one is used."""
        try:
            from opentelemetry import trace  # noqa: PLC0415 - optional
        except ImportError as error:
            raise OpenTelemetryMissingError(_MISSING) from error
        self._api = trace
        self._tracer = trace.get_tracer(INSTRUMENTATION, tracer_provider=tracer_provider)
        self._runs: dict[str, _OpenRun] = {}

    def span_started(self, span: Span) -> None:
        """Begin its counterpart under that of its parent."""
        if span.parent_id is None and len(self._runs) < MAX_OPEN_RUNS:
            self._runs[span.run_id] = _OpenRun()
        run = self._runs.get(span.run_id)
        if run is None:
            return
        run.spans[span.span_id] = self._tracer.start_span(
            _name(span),
            context=self._parent_context(run, span),
            kind=self._api.SpanKind.CLIENT if span.kind == "model" else self._api.SpanKind.INTERNAL,
            attributes=_fixed_attributes(span) | _attributes(span),
            start_time=run.wall_time(span.started_at),
        )

    def span_ended(self, span: Span) -> None:
        """End its counterpart, with its last attributes and its status."""
        run = self._runs.get(span.run_id)
        counterpart = run.spans.pop(span.span_id, None) if run else None
        if run is None or counterpart is None or span.ended_at is None:
            return
        if span.parent_id is None:
            del self._runs[span.run_id]
        counterpart.set_attributes(_attributes(span))
        if span.error is not None:
            counterpart.set_attribute("error.type", _error_type(span.error))
            counterpart.set_status(self._api.StatusCode.ERROR, span.error[:MAX_TEXT_CHARS])
        counterpart.end(end_time=run.wall_time(span.ended_at))

    def _parent_context(self, run: _OpenRun, span: Span) -> Context | None:
        """None, which is what is current, for the run itself; its span for what comes after the end of its parent."""
        if span.parent_id is None:
            return None
        parent = run.spans.get(span.parent_id) or run.spans[1]
        return self._api.set_span_in_context(parent)


def _name(span: Span) -> str:
    return f"{OPERATIONS.get(span.kind, span.kind)} {span.name}"


def _fixed_attributes(span: Span) -> dict[str, Any]:
    """What is known of it by its kind and name."""
    attributes: dict[str, Any] = {"lumos.run_id": span.run_id}
    if span.kind in OPERATIONS:
        attributes["gen_ai.operation.name"] = OPERATIONS[span.kind]
    match span.kind:
        case "run":
            attributes["gen_ai.agent.name"] = span.name
        case "model":
            attributes["gen_ai.request.model"] = span.name
        case "tool":
            attributes["gen_ai.tool.name"] = span.name
            attributes["gen_ai.tool.type"] = "function"
    return attributes


def _attributes(span: Span) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for name, value in sorted(span.attributes.items(), key=lambda item: item[0] == "answered_by"):
        if value is None:
            continue
        match name:
            case "provider" | "answered_by":
                attributes[ATTRIBUTES[name]] = PROVIDERS.get(value, value)
            case "finish_reason":
                attributes[ATTRIBUTES[name]] = [value]
            case "ttfb_ms" if span.kind == "model":
                attributes["gen_ai.response.time_to_first_chunk"] = value / 1000
            case _:
                attributes[ATTRIBUTES.get(name, f"lumos.{name}")] = _plain(value)
    return attributes


def _plain(value: Any) -> bool | int | float | str:
    """A value that OpenTelemetry takes."""
    return value if isinstance(value, bool | int | float) else str(value)[:MAX_TEXT_CHARS]


def _error_type(error: str) -> str:
    """The error if it is a code or a class's name; a sentence is no type."""
    return error if _LOW_CARDINALITY.fullmatch(error) else _OTHER_ERROR


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1_000_000_000)
