"""Runs as OpenTelemetry spans: parents, times, names, errors, and runs at the same time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes
from trio.testing import MockClock

from engine.trace import Tracer
from server import otel
from server.otel import ATTRIBUTES, OPERATIONS, PROVIDERS, OpenTelemetryCollector

SECOND = 1_000_000_000


class Exported:
    """A provider and what came out of it."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.collector = OpenTelemetryCollector(self.provider)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._memory.get_finished_spans()}

    def attributes(self, name: str) -> dict[str, Any]:
        return dict(self.spans[name].attributes or {})


@pytest.fixture
def exported() -> Iterator[Exported]:
    exported = Exported()
    yield exported
    exported.provider.shutdown()


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def own_id(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def trace_id(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id


async def one_run(collector: OpenTelemetryCollector, run_id: str, agent: str) -> None:
    """A run of 6 s: a memory read, one step with a model call of 2 s and a tool call of 3 s that fails."""
    tracer = Tracer(run_id, collector)
    with tracer.span("run", agent, agent_id=agent, session_id="s1") as run:
        with tracer.span("memory", "history", run):
            await trio.sleep(1)
        with tracer.span("step", "step-1", run) as step:
            with tracer.span("model", "gpt-9", step, provider="gemini", model="gpt-9") as model:
                await trio.sleep(2)
                tracer.note(model, input_tokens=7, output_tokens=9, finish_reason="tool_calls", ttfb_ms=1500.0)
            tool = tracer.begin("tool", "slow", step, call_id="c1")
            await trio.sleep(3)
            tracer.end(tool, "timed out after 3 s", tool_calls=None)
        tracer.note(run, steps=1, ttfb_ms=2500.0, status="done")


async def test_a_run_is_a_trace(exported: Exported, autojump_clock: MockClock) -> None:
    before = time.time_ns()
    await one_run(exported.collector, "r1", "helper")
    spans = exported.spans
    run, step = spans["invoke_agent helper"], spans["step step-1"]
    model, tool, memory = spans["chat gpt-9"], spans["execute_tool slow"], spans["memory history"]
    assert [parent_of(span) for span in (run, step, model, tool, memory)] == [
        None,
        own_id(run),
        own_id(step),
        own_id(step),
        own_id(run),
    ]
    assert len({trace_id(span) for span in spans.values()}) == 1
    start = run.start_time or 0
    assert before <= start <= time.time_ns()

    def times(span: ReadableSpan) -> tuple[float, float]:
        return (((span.start_time or 0) - start) / SECOND, ((span.end_time or 0) - start) / SECOND)

    assert [times(span) for span in (run, memory, step, model, tool)] == [(0, 6), (0, 1), (1, 6), (1, 3), (3, 6)]
    assert model.kind is trace.SpanKind.CLIENT
    assert {span.kind for span in (run, step, tool, memory)} == {trace.SpanKind.INTERNAL}


async def test_spans_have_the_attributes_of_the_conventions(exported: Exported, autojump_clock: MockClock) -> None:
    await one_run(exported.collector, "r1", "helper")
    assert exported.attributes("invoke_agent helper") == {
        "lumos.run_id": "r1",
        "lumos.steps": 1,
        "lumos.ttfb_ms": 2500.0,
        "lumos.status": "done",
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.id": "helper",
        "gen_ai.agent.name": "helper",
        "gen_ai.conversation.id": "s1",
    }
    assert exported.attributes("chat gpt-9") == {
        "lumos.run_id": "r1",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "gcp.gemini",
        "gen_ai.request.model": "gpt-9",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.response.finish_reasons": ("tool_calls",),
        "gen_ai.response.time_to_first_chunk": 1.5,
    }
    assert exported.attributes("execute_tool slow") == {
        "lumos.run_id": "r1",
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "slow",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": "c1",
        "error.type": "_OTHER",
    }
    assert exported.attributes("step step-1") == exported.attributes("memory history") == {"lumos.run_id": "r1"}


async def test_who_answered_is_the_provider(exported: Exported) -> None:
    tracer = Tracer("r", exported.collector)
    run = tracer.begin("run", "a")
    model = tracer.begin("model", "m", run, provider="failover")
    tracer.end(model, answered_by="mistral", detail=["x" * 1000])
    tracer.end(run)
    attributes = exported.attributes("chat m")
    assert attributes["gen_ai.provider.name"] == "mistral_ai"
    assert len(attributes["lumos.detail"]) == 256


async def test_what_failed_has_the_status_and_the_type_of_its_error(exported: Exported) -> None:
    tracer = Tracer("r", exported.collector)
    run = tracer.begin("run", "a")
    tracer.begin("step", "step-1", run)
    tracer.end(tracer.begin("memory", "fine", run))
    tracer.end(run, "upstream.rate_limit")
    spans = exported.spans
    assert (spans["invoke_agent a"].status.status_code, spans["invoke_agent a"].status.description) == (
        trace.StatusCode.ERROR,
        "upstream.rate_limit",
    )
    assert exported.attributes("invoke_agent a")["error.type"] == "upstream.rate_limit"
    assert spans["step step-1"].status.description == "not ended"
    assert spans["memory fine"].status.status_code is trace.StatusCode.UNSET


async def test_runs_at_the_same_time_do_not_mix(exported: Exported, autojump_clock: MockClock) -> None:
    tracers = {run_id: Tracer(run_id, exported.collector) for run_id in ("a", "b")}
    runs = {run_id: tracer.begin("run", run_id) for run_id, tracer in tracers.items()}
    steps = {run_id: tracers[run_id].begin("step", f"of-{run_id}", runs[run_id]) for run_id in ("b", "a")}
    tracers["a"].end(runs["a"])
    tools = tracers["b"].begin("tool", "of-b", steps["b"])
    tracers["b"].end(tools)
    tracers["b"].end(runs["b"])
    spans = exported.spans
    assert parent_of(spans["step of-a"]) == own_id(spans["invoke_agent a"])
    assert parent_of(spans["step of-b"]) == own_id(spans["invoke_agent b"])
    assert parent_of(spans["execute_tool of-b"]) == own_id(spans["step of-b"])
    assert trace_id(spans["step of-a"]) != trace_id(spans["step of-b"])
    assert not trace.get_current_span().get_span_context().is_valid
    assert exported.collector._runs == {}


async def test_a_run_joins_the_trace_of_what_started_it(exported: Exported) -> None:
    with exported.provider.get_tracer("test").start_as_current_span("request"):
        tracer = Tracer("r", exported.collector)
        run = tracer.begin("run", "a")
        tracer.end(tracer.begin("step", "step-1", run))
    tracer.end(run)
    spans = exported.spans
    assert parent_of(spans["invoke_agent a"]) == own_id(spans["request"])
    assert parent_of(spans["step step-1"]) == own_id(spans["invoke_agent a"])


async def test_a_span_after_its_parents_end_is_the_runs(exported: Exported) -> None:
    tracer = Tracer("r", exported.collector)
    run = tracer.begin("run", "a")
    step = tracer.begin("step", "step-1", run)
    tracer.end(step)
    tracer.end(tracer.begin("tool", "late", step))
    tracer.end(run)
    tracer.end(tracer.begin("tool", "too late", run))
    assert parent_of(exported.spans["execute_tool late"]) == own_id(exported.spans["invoke_agent a"])
    assert "execute_tool too late" not in exported.spans


async def test_what_is_not_sampled_and_what_is_too_much_is_not_kept(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    silent = OpenTelemetryCollector(TracerProvider(sampler=ALWAYS_OFF))
    await one_run(silent, "r", "helper")
    monkeypatch.setattr(otel, "MAX_OPEN_RUNS", 1)
    first = Tracer("first", exported.collector)
    run = first.begin("run", "first")
    await one_run(exported.collector, "second", "second")
    first.end(run)
    assert list(exported.spans) == ["invoke_agent first"]


def test_our_names_are_those_of_the_conventions() -> None:
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    used = {*ATTRIBUTES.values(), "gen_ai.operation.name", "gen_ai.tool.name", "gen_ai.tool.type"}
    used |= {"gen_ai.agent.name", "gen_ai.response.time_to_first_chunk"}
    assert used <= known
    assert set(OPERATIONS.values()) <= {value.value for value in gen_ai_attributes.GenAiOperationNameValues}
    assert set(PROVIDERS.values()) <= {value.value for value in gen_ai_attributes.GenAiProviderNameValues}
    assert error_attributes.ERROR_TYPE == "error.type"
    assert error_attributes.ErrorTypeValues.OTHER.value == "_OTHER"


def test_without_the_extra_the_error_names_it() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from server.otel import OpenTelemetryCollector, OpenTelemetryMissingError\n"
        "try: OpenTelemetryCollector()\n"
        "except OpenTelemetryMissingError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "OpenTelemetry traces need their packages: pip install 'lumos-stream[otel]'\n"
