"""What ended runs keep in memory: their logs and little else, so many and so much of them."""

from __future__ import annotations

import gc
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import pytest
import trio
from trio.testing import MockClock

from engine import Message, ModelRequest, RetentionLimits, Run, RunSpec, RunSupervisor
from engine.supervisor import kept_bytes

from .scripted import FOREVER, Line, ScriptedProvider, read_timed, spec_for, text

SILENCE: Line = (FOREVER, ())


class Schema(dict[str, object]):
    """A request's option that tells when it is gone."""


def holding(schema: Schema, *script: Line) -> RunSpec:
    """A run whose request holds this object; the provider does not remember it."""
    provider = ScriptedProvider(*script)
    provider.requests = Forgetful()
    request = ModelRequest((Message("user", "12345678"),), "model", response_schema=schema)
    return RunSpec(agent_id="agent", provider=provider, request=request)


class Forgetful(list[ModelRequest]):
    """A list that stays empty."""

    def append(self, _: ModelRequest) -> None:
        """Forget."""


@pytest.mark.parametrize("how", ["answered", "stopped", "stopped before its first step"])
async def test_an_ended_run_holds_no_request(autojump_clock: MockClock, how: str) -> None:
    schema = Schema()
    held = weakref.ref(schema)
    async with trio.open_nursery() as nursery:
        run = RunSupervisor(nursery).start(holding(schema, (1, text("four")), (9, ())))
        del schema
        if how != "stopped before its first step":
            await trio.sleep(2)
            assert held() is not None
        if how != "answered":
            run.stop()
    await trio.sleep(1)
    gc.collect()
    assert held() is None
    assert (run.spec.agent_id, run.spec.provider.name, run.spec.request.model) == ("agent", "scripted", "model")
    assert run.response == ("" if how == "stopped before its first step" else "four")
    assert (run.usage is not None) == (run.response != "")


async def test_an_ended_run_holds_the_answers_pieces_no_more(autojump_clock: MockClock) -> None:
    word = str(b"four", "ascii")  # an object of its own
    run = Run("run", spec_for(ScriptedProvider((1, text("twenty-")), (2, text(word)))))
    await run.execute()
    gc.collect()
    assert run.response == "twenty-four"
    assert [holder for holder in gc.get_referrers(word) if isinstance(holder, list)] == []


async def test_ended_runs_are_kept_up_to_so_many(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, retention=RetentionLimits(runs=2))
        runs = []
        for _ in range(4):
            runs.append(supervisor.start(spec_for(ScriptedProvider((1, text("a"))))))
            await trio.sleep(2)
    assert [supervisor.find(run.id) for run in runs] == [None, None, *runs[2:]]


async def test_a_limit_of_no_runs_keeps_none(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, retention=RetentionLimits(runs=0))
        run = supervisor.start(spec_for(ScriptedProvider((1, text("a")))))
    assert supervisor.find(run.id) is None
    assert supervisor._ended_bytes == 0


def word_by_word(word: str, words: int) -> RunSpec:
    """A run of many small deltas, each sealed by a reader that waits for it."""
    script: list[Line] = [(number / 8, text(word)) for number in range(1, words + 1)]
    return spec_for(ScriptedProvider(*script), resume_grace=inf)


@contextmanager
def untraced() -> Iterator[None]:
    """No tracer (of the coverage, say) for as long as the block lasts: its own objects would be counted."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


@pytest.mark.parametrize(("word", "words"), [("a", 1), (" word", 300), ("\u65e5\u672c", 300), ("\u65e5" * 20_000, 3)])
async def test_what_is_charged_is_about_what_is_taken(autojump_clock: MockClock, word: str, words: int) -> None:
    runs: list[Run] = []

    async def chat() -> None:
        async with trio.open_nursery() as nursery:
            runs.append(RunSupervisor(nursery).start(word_by_word(word, words)))
            await read_timed(runs[-1].log)
        runs[-1].spec.provider.script = ()  # type: ignore[attr-defined]  # the script is the test's, not the run's

    await chat()
    gc.collect()
    with untraced():
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(5):
                await chat()
            gc.collect()
            taken = (tracemalloc.get_traced_memory()[0] - before) / 5
        finally:
            tracemalloc.stop()
    assert taken < 1.25 * kept_bytes(runs[-1])
    assert kept_bytes(runs[-1]) < 2 * taken
