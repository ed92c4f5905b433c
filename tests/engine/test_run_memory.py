"""What a run leaves behind: the turn is begun once, kept once whatever ends the run, and ``done`` means kept."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from math import inf
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import (
    AgentStopped,
    Deadlines,
    Emit,
    Error,
    GenerationComplete,
    LogEntry,
    Message,
    ModelRequest,
    ProviderError,
    Run,
    RunSpec,
    RunSupervisor,
    StreamingAgent,
    StreamingConfig,
    ToolCall,
    ToolUse,
    TurnRecord,
    Usage,
    begin_turn,
)
from engine.memory import AtHand

from .fake_guests import FakeMemory, FakeTool, WritingTraces, holds_until, stubborn, takes
from .loop_scene import start_in
from .scripted import (
    FOREVER,
    Line,
    ProgrammedProvider,
    StepwiseProvider,
    WritingObserver,
    agent_for,
    assert_ended_once,
    calling,
    read_timed,
    saying,
    spec_for,
    text,
)

pytestmark = pytest.mark.usefixtures("either_memory")

ANSWER = StepwiseProvider(saying("x", at=1))


def keeping(memory: FakeMemory, *scripts: list[Line], **settings: Any) -> RunSpec:
    """A run of these steps that leaves its turn to the memory, and reads nothing that takes time."""
    return spec_for(StepwiseProvider(*scripts), **{"resume_grace": inf, "memory_use": memory.used(), **settings})


def saves(memory: FakeMemory) -> list[float]:
    """When the memory was asked to keep a turn."""
    return [at for at, what in memory.seen if what == "save_turn"]


# Begin


async def test_the_turn_is_begun_once_before_the_run(autojump_clock: MockClock) -> None:
    memory = FakeMemory(delays={"begin_turn": 3})
    agent = agent_for(StepwiseProvider(saying("x")), memories=lambda _: memory.used())
    stream = StreamingAgent(agent, StreamingConfig()).execute_streaming("Hi")
    async with stream as events:
        assert trio.current_time() == 3.0
        assert stream.run is not None
        assert memory.begun == [(stream.run.id, Message("user", "Hi"))]
        async for _ in events:
            pass
    assert [what for _, what in memory.seen].count("begin_turn") == 1
    assert [record.run_id for record in memory.saved] == [stream.run.id]


async def test_a_turn_that_cannot_be_begun_starts_no_run(autojump_clock: MockClock) -> None:
    memory = FakeMemory(failures={"begin_turn": OSError("full")})
    agent = agent_for(ANSWER, memories=lambda _: memory.used())
    with pytest.raises(OSError, match="full"):
        await agent.generate("Hi")
    assert ANSWER.requests == []
    assert memory.saved == []


async def test_without_a_message_of_the_user_or_a_memory_nothing_is_begun(autojump_clock: MockClock) -> None:
    memory = FakeMemory()
    agent = agent_for(ANSWER, memories=lambda _: memory.used())
    await begin_turn(agent.run_spec(Message("assistant", "Hi")), "run")
    await begin_turn(agent_for(ANSWER).run_spec("Hi"), "run")
    assert memory.begun == []


# Keep


async def test_a_whole_turn_is_kept_with_its_tools(autojump_clock: MockClock) -> None:
    memory = FakeMemory()
    tool = FakeTool("t", takes(1))
    run = Run("run", keeping(memory, calling("a t {}", said="One."), saying("Two."), tools=[tool]))
    await run.execute()
    messages = (
        Message("assistant", "One.", tool_calls=(ToolCall("a", "t", "{}"),)),
        Message("tool", "done", tool_call_id="a"),
        Message("assistant", "Two."),
    )
    assert memory.saved == [
        TurnRecord(
            run_id="run",
            status="done",
            messages=messages,
            response="One.\n\nTwo.",
            usage=run.usage,
            total_steps=2,
            elapsed_ms=1000.0,
            ttfb_ms=0.0,
        )
    ]
    assert tool.contexts[0].memory is memory


async def test_done_is_said_when_the_turn_is_kept(autojump_clock: MockClock) -> None:
    memory = FakeMemory(delays={"save_turn": 2})
    run = Run("run", keeping(memory, saying("x", at=1)))
    ended: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        with run.log.attached():
            await trio.sleep(1.5)
            assert not run.log.ended
            assert run.stop() is False
            assert run.fail("draining", "bye") is False
            got = await read_timed(run.log)
            ended.append(trio.current_time())
    assert isinstance(got[-1][1], GenerationComplete)
    assert (ended, got[-1][0], run.elapsed) == ([3.0], 3.0, 1.0)
    assert_ended_once(run)
    assert saves(memory) == [1.0]


@pytest.mark.parametrize("how", ["reader gone", "total", "cancelled"])
async def test_nothing_ends_a_whole_answer_otherwise_while_it_is_kept(autojump_clock: MockClock, how: str) -> None:
    memory = FakeMemory(delays={"save_turn": 2})
    limits = Deadlines(total=2 if how == "total" else 100)
    run = Run("run", keeping(memory, saying("x", at=1), resume_grace=0, deadlines=limits))
    async with trio.open_nursery() as nursery:
        surrounding = start_in(nursery, run)
        with run.log.attached():
            await trio.sleep(1.5)
            if how == "cancelled":
                surrounding.cancel()
            if how == "total":
                await trio.sleep(1)
    assert trio.current_time() == 3.0
    assert isinstance(run.log.terminal, GenerationComplete)
    assert [record.status for record in memory.saved] == ["done"]
    assert_ended_once(run)


@pytest.mark.parametrize(
    ("failure", "logged"),
    [
        (OSError("full"), "the turn of run run could not be kept"),
        (SystemExit(), "the turn of run run could not be kept"),
        (BaseExceptionGroup("mixed", [OSError(), SystemExit()]), "the turn of run run could not be kept"),
        (None, "the turn of run run was not kept within 6 s"),
    ],
    ids=repr,
)
async def test_a_memory_that_fails_or_hangs_costs_no_answer(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, failure: BaseException | None, logged: str
) -> None:
    memory = FakeMemory(failures={"save_turn": failure}) if failure else FakeMemory(delays={"save_turn": FOREVER})
    run = Run("run", keeping(memory, saying("x", at=1)))
    await run.execute()
    assert_ended_once(run)
    assert isinstance(run.log.terminal, GenerationComplete)
    assert trio.current_time() == (1.0 if failure else 7.0)
    assert saves(memory) == [1.0]
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.ERROR, logged)]


async def test_a_memory_that_cannot_be_cancelled_costs_no_more_than_one_that_hangs(autojump_clock: MockClock) -> None:
    let_go = trio.Event()

    class Stubborn(FakeMemory):
        is_prompt = False

        async def save_turn(self, turn: TurnRecord) -> None:
            await stubborn(let_go)
            await super().save_turn(turn)

    memory = Stubborn()
    observer = WritingObserver()
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, observer)
        run = supervisor.start(keeping(memory, saying("x", at=1)))
        await trio.sleep(7.5)
        assert isinstance(run.log.terminal, GenerationComplete)
        assert observer.seen[-1] == (7.0, "done")
        assert supervisor.active_runs == 1
        await trio.sleep(1)
        assert supervisor.active_runs == 0
        assert supervisor.find(run.id) is run
        let_go.set()
    assert supervisor.find(run.id) is run
    assert len(memory.saved) == 0  # its time was over: it was cancelled where it could be


BROKEN: list[Line] = [(1, text("Two")), (FOREVER, ())]


@pytest.mark.parametrize("how", ["stop", "reader gone", "total", "provider", "cancelled", "drain"])
async def test_of_a_run_that_broke_off_there_is_what_it_said(autojump_clock: MockClock, how: str) -> None:
    memory = FakeMemory(delays={"save_turn": 1})
    broken: list[Line] = [*BROKEN[:1], (2, ProviderError("upstream.server", "no"))] if how == "provider" else BROKEN
    spec = keeping(
        memory,
        calling("a t"),
        broken,
        tools=[FakeTool("t", takes(1))],
        resume_grace=0,
        deadlines=Deadlines(total=3 if how == "total" else 100),
    )
    run = Run("run", spec)
    async with trio.open_nursery() as nursery:
        surrounding = start_in(nursery, run)
        with run.log.attached():
            await trio.sleep(3)
            if how == "stop":
                run.stop()
            elif how == "drain":
                run.fail("draining", "bye")
            elif how == "cancelled":
                surrounding.cancel()
            await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() == 4.0, "kept for a second, in a shield with a limit"
    assert run.elapsed == 3.0
    assert_ended_once(run)
    (record,) = memory.saved
    assert [(message.role, message.content) for message in record.messages] == [
        ("assistant", ""),
        ("tool", "done"),
        ("assistant", "Two"),
    ]
    code = {"total": "timeout.total", "provider": "upstream.server", "cancelled": "interrupted", "drain": "draining"}
    reason = {"stop": "requested", "reader gone": "disconnect"}
    assert (record.error_code, record.reason) == (code.get(how), reason.get(how))
    assert record.status == ("error" if how in code else "stop")
    assert (record.response, record.total_steps, record.elapsed_ms, record.ttfb_ms) == ("Two", 2, 3000.0, 0.0)
    assert record.usage == run.usage
    assert isinstance(record.usage, Usage)


async def test_what_a_cancelled_model_still_says_is_not_kept(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            emit(text("late"))

    memory = FakeMemory()
    run = Run("run", spec_for(ProgrammedProvider(answer), memory_use=memory.used()))
    async with trio.open_nursery() as nursery:
        start_in(nursery, run)
        await trio.sleep(1)
        run.stop()
    (record,) = memory.saved
    assert (record.messages, record.response, record.usage) == ((), "", None)
    assert record.ttfb_ms is run.ttfb is None


async def test_the_calls_of_a_step_that_broke_off_are_not_kept_and_its_text_is(autojump_clock: MockClock) -> None:
    memory = FakeMemory()
    run = Run("run", keeping(memory, calling("a t", said="Let me."), tools=[FakeTool("t", takes(FOREVER))]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        await trio.sleep(1)
        run.stop()
    assert [record.messages for record in memory.saved] == [(Message("assistant", "Let me."),)]


async def test_an_empty_answer_leaves_no_message(autojump_clock: MockClock) -> None:
    memory = FakeMemory()
    await Run("run", keeping(memory, saying(""))).execute()
    assert [(record.status, record.messages) for record in memory.saved] == [("done", ())]


async def test_a_run_that_ran_out_is_kept_as_failed(autojump_clock: MockClock) -> None:
    memory = FakeMemory()
    use = ToolUse(tools=(FakeTool("t", takes(1)),), max_steps=1)
    await Run("run", keeping(memory, calling("a t"), tool_use=use)).execute()
    assert [(record.status, record.error_code) for record in memory.saved] == [("error", "max_steps")]


async def test_a_run_stopped_before_its_first_step_is_kept_too(autojump_clock: MockClock) -> None:
    memory = FakeMemory()
    run = Run("run", keeping(memory, saying("x")))
    run.stop()
    await run.execute()
    assert [(record.status, record.messages, record.total_steps) for record in memory.saved] == [("stop", (), 0)]
    assert [what for _, what in memory.seen] == ["save_turn"]


# The supervisor


async def test_a_drain_waits_for_a_whole_answer_to_be_kept(autojump_clock: MockClock) -> None:
    memory = FakeMemory(delays={"save_turn": 3})
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run = supervisor.start(keeping(memory, saying("x", at=1)))
        other = supervisor.start(keeping(FakeMemory(delays={"save_turn": 4}), [(FOREVER, ())]))
        await trio.sleep(1.5)
        await supervisor.drain(0.5)
        assert trio.current_time() == 4.0
        assert isinstance(run.log.terminal, GenerationComplete)
        assert isinstance(other.log.terminal, Error)


async def test_a_tool_that_cannot_be_cancelled_holds_neither_count_nor_drain_nor_the_agent(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = trio.Event()
    tool = FakeTool("t", holds_until(let_go))
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run = supervisor.start(keeping(FakeMemory(), calling("a t"), tools=[tool]), "chosen")
        other = supervisor.start(keeping(FakeMemory(), calling("a t"), tools=[tool]))
        await trio.sleep(1)
        assert (run.id, supervisor.find("chosen")) == ("chosen", run)
        assert run.stop()
        await trio.sleep(1.5)
        assert supervisor.active_runs == 1
        assert "chosen is over, but tool t cannot be cancelled" in caplog.text
        again = supervisor.start(keeping(FakeMemory(), saying("x")))
        await trio.sleep(1)
        assert isinstance(again.log.terminal, GenerationComplete)
        await supervisor.drain(1)
        assert trio.current_time() == 4.5
        assert isinstance(other.log.terminal, Error)
        await trio.sleep(2)
        assert supervisor.active_runs == 0
        let_go.set()
    assert supervisor.find("chosen") is run


# What is left


class Held(dict[str, object]):
    """A request's option that tells when it is gone."""


@pytest.mark.parametrize("how", ["answered", "stopped", "held"])
async def test_an_ended_run_holds_nothing_of_its_guests(autojump_clock: MockClock, how: str) -> None:
    let_go = trio.Event()
    memory, schema = FakeMemory(), Held()
    tool = FakeTool("t", holds_until(let_go) if how == "held" else takes(1))
    held = [*map(weakref.ref, (memory, tool, schema))]
    ended: list[Run] = []
    async with trio.open_nursery() as nursery:
        spec = keeping(memory, calling("a t"), saying("x"), tools=[tool], trace=WritingTraces(), on_ended=ended.append)
        spec.provider.requests = Nothing()  # type: ignore[attr-defined]  # the provider is a fake
        request = ModelRequest((Message("user", "x"),), "model", response_schema=schema)
        run = RunSupervisor(nursery).start(msgspec.structs.replace(spec, request=request))
        del spec, memory, tool, schema, request
        await trio.sleep(0.5)
        assert all(reference() is not None for reference in held)
        if how == "stopped":
            run.stop()
        await trio.sleep(100)
        let_go.set()
    assert ended == [run]
    await trio.sleep(1)
    gc.collect()
    assert [reference() for reference in held] == [None, None, None]
    assert isinstance(run.log.terminal, AgentStopped if how == "stopped" else GenerationComplete)


class Nothing(list[ModelRequest]):
    """A list that stays empty."""

    def append(self, _: ModelRequest) -> None:
        """Forget."""


async def test_the_last_words_are_taken_before_the_turn_is_kept(autojump_clock: MockClock) -> None:
    run = Run("run", keeping(FakeMemory(delays={"save_turn": 2}), saying("x", at=1)))
    story: list[tuple[float, str, list[str]]] = []

    def note(how: str, entries: Sequence[LogEntry]) -> None:
        story.append((trio.current_time(), how, [type(entry.event).__name__ for entry in entries]))

    def take(entries: Sequence[LogEntry], _: float) -> bool:
        note("taken", entries)
        return True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.execute)
        after = 0
        while entries := await run.log.read(after, take=take):
            note("read", entries)
            after = entries[-1].seq
    assert story == [
        (0.0, "read", ["AgentStarted"]),
        (1.0, "taken", ["TextDelta"]),
        (1.0, "taken", ["StepComplete"]),
        (3.0, "read", ["GenerationComplete"]),
    ]


async def test_a_prompt_memory_needs_no_task_of_its_own(autojump_clock: MockClock) -> None:
    asked: dict[str, str] = {}

    class Noting(FakeMemory):
        async def _do(self, what: str, *details: object) -> None:
            asked[what] = trio.lowlevel.current_task().name
            await super()._do(what, *details)

    memory = Noting()
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, new_run_id=lambda: "r")
        supervisor.start(keeping(memory, saying("x"), memory_use=memory.used(has_document=False, at_hand=with_history)))
    hosted = {"recall": "memory memories", "save_turn": "memory save_turn"}
    assert asked == (dict.fromkeys(hosted, "run r") if memory.is_prompt else hosted)


def with_history() -> AtHand:
    return AtHand(history=())
