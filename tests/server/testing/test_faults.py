"""Each fault is what it is called, in every vendor's format; each assertion says what there was instead."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import trio

from engine import AgentStarted, Error, GenerationComplete, TextDelta
from providers.encoders import MOCKED_VENDORS
from server.testing import (
    Answer,
    ChatRun,
    Faults,
    Replay,
    VirtualLumos,
    assert_done,
    assert_error,
    assert_events,
    assert_nothing_left,
    assert_stopped,
    assert_text,
    assert_tool_called,
    assert_ttfb,
    assert_ttft,
)
from server.testing.answers import ModelAnswer

WORDS = Replay().text("one two three four", first=1, every=1)
FAULTS = Faults()

BROKEN: dict[str, tuple[ModelAnswer, str, float, str]] = {
    "refuse": (FAULTS.refuse(), "upstream.connection", 0, ""),
    "never_connects": (FAULTS.never_connects(), "timeout.connect", 10, ""),
    "never_answers": (FAULTS.never_answers(), "timeout.first_token", 30, ""),
    "429": (FAULTS.status(429), "upstream.rate_limit", 0, ""),
    "500": (FAULTS.status(500), "upstream.server", 0, ""),
    "529": (FAULTS.status(529), "upstream.overloaded", 0, ""),
    "stall at first": (FAULTS.stall(WORDS, after=0), "timeout.first_token", 30, ""),
    "stall": (FAULTS.stall(WORDS, after=3), "timeout.idle", 33, "one two three"),
    "long stall": (FAULTS.stall(WORDS, after=3, seconds=60), "timeout.idle", 33, "one two three"),
    "cut": (FAULTS.cut(WORDS, after=2), "upstream.connection", 2, "one two"),
    "reset": (FAULTS.cut(WORDS, after=2, reset=True), "upstream.connection", 2, "one two"),
    "no end mark": (FAULTS.no_end_mark(WORDS), "upstream.truncated", 4, "one two three four"),
    "no end mark early": (FAULTS.no_end_mark(WORDS, after=1), "upstream.truncated", 1, "one"),
    "error event": (FAULTS.error_event(WORDS, after=2), "upstream.overloaded", 2, "one two"),
    "html": (FAULTS.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"), "upstream.protocol", 0, ""),
    "late reset": (FAULTS.raw(1.5, "reset"), "upstream.connection", 1.5, ""),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_goes_wrong_upstream(virtual_lumos: VirtualLumos, name: str) -> None:
    answer, code, at, text = BROKEN[name]
    virtual_lumos.add_agent("helper", answer)
    run = await virtual_lumos.chat("helper")
    assert_error(run, code, at=at)
    assert_text(run, text)
    await assert_nothing_left(virtual_lumos)


async def test_a_short_stall_delays_the_rest(virtual_lumos: VirtualLumos) -> None:
    virtual_lumos.add_agent("helper", FAULTS.stall(WORDS, after=2, seconds=20))
    run = await virtual_lumos.chat("helper")
    assert_done(run, "one two three four", at=24)
    assert_events(run, (2, TextDelta), (23, TextDelta), (24, TextDelta), (24, GenerationComplete))


async def test_faults_of_a_recording_that_has_raw_bytes(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    short = replay("gpt4o-short")
    virtual_lumos.add_agent("helper", FAULTS.cut(short, after=5))
    run = await virtual_lumos.chat("helper")
    assert_error(run, "upstream.connection")
    assert run.text
    assert short.text.startswith(run.text)


async def test_nobody_can_be_connected_once_and_then_can(virtual_lumos: VirtualLumos) -> None:
    answers: list[ModelAnswer] = [FAULTS.refuse(), WORDS, FAULTS.refuse(), WORDS]
    model = virtual_lumos.add_agent("helper", *answers, retries=1)
    assert_done(await virtual_lumos.chat("helper"), WORDS.text)
    assert_done(await virtual_lumos.chat("helper"), WORDS.text)  # it had a connection that was still open
    assert len(model.calls) == 2


async def test_every_wire_format_says_it(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    tea = replay.tool_call("order", {"item": "tea"}, text="Well,", at=1)

    async def order(item: str) -> str:
        return item

    for provider in MOCKED_VENDORS:
        virtual_lumos.add_agent(provider, tea, WORDS, FAULTS.cut(WORDS, after=2), provider=provider, tools=[order])
    for provider in MOCKED_VENDORS:
        run = await virtual_lumos.chat(provider)
        assert_tool_called(run, "order", arguments={"item": "tea"}, result="tea")
        assert_done(run, f"Well,\n\n{WORDS.text}", at=5)
        cut = await virtual_lumos.chat(provider)
        assert_error(cut, "upstream.connection", at=2)
        assert_text(cut, "one two")


def test_a_fault_has_a_place_in_the_answer() -> None:
    with pytest.raises(ValueError, match="says 4 things, so nothing can happen after 5"):
        FAULTS.cut(WORDS, after=5)
    assert isinstance(FAULTS.cut(WORDS, after=4), Answer)


@pytest.fixture
def refuted() -> Callable[[ChatRun], dict[str, Callable[[], object]]]:
    """Assertions that do not hold of a run of ``WORDS`` that fails at 2 s, by what they say."""
    return lambda run: {
        r"the first content came at 1 s, not at 1\.5 s": lambda: assert_ttfb(run, 1.5),
        r"the first text came at 1 s, not at 2 s ± 0\.5": lambda: assert_ttft(run, 2, tolerance=0.5),
        r"the text differs from character 5 on: 'wo', not 'oo'": lambda: assert_text(run, "one too"),
        r"the text differs from character 7 on: it ends, not ' three'": lambda: assert_text(run, "one two three"),
        r"the run did not come to its end": lambda: assert_done(run),
        r"the run failed with 'upstream\.overloaded' \(.*\), not with 'internal'": lambda: assert_error(
            run, "internal"
        ),
        r"the end came at 2 s, not at 3 s": lambda: assert_error(run, "upstream.overloaded", at=3),
        r"the run was not stopped": lambda: assert_stopped(run),
        r"there was no such call of 'order'; there were: none": lambda: assert_tool_called(run, "order"),
        r"number 2 of the expected .*: TextDelta at 3 s": lambda: assert_events(run, AgentStarted, (3, TextDelta)),
        r"number 1 .*: TextDelta\(content='x'": lambda: assert_events(run, TextDelta("x", "step-1")),
        r"number 1 .*: GenerationComplete\n": lambda: assert_events(run, GenerationComplete),
    }


async def test_assertions_say_what_there_was(
    virtual_lumos: VirtualLumos, refuted: Callable[[ChatRun], dict[str, Callable[[], object]]]
) -> None:
    virtual_lumos.add_agent("helper", FAULTS.error_event(WORDS, after=2))
    run = await virtual_lumos.chat("helper")
    assert_ttfb(run, 1.2, tolerance=0.2)
    assert_events(run, AgentStarted, (1, TextDelta), (2, Error))
    for message, assertion in refuted(run).items():
        with pytest.raises(AssertionError) as failure:
            assertion()
        assert re.match(message, str(failure.value)), str(failure.value)
        assert '\n    2.000000  {"chunk_type":"error","code":"upstream.overloaded"' in str(failure.value)


async def test_what_is_left_is_named(virtual_lumos: VirtualLumos) -> None:
    virtual_lumos.add_agent("helper", FAULTS.stall(WORDS, after=1))
    async with virtual_lumos.open_chat("helper", on_disconnect="continue") as run:
        await run.read(events=2)
    await trio.sleep(1)
    with pytest.raises(AssertionError) as failure:
        await assert_nothing_left(virtual_lumos)
    assert str(failure.value).splitlines() == [
        "at 2 s there is still",
        "  1 run(s) under way",
        f"  the task 'run {run.run_id}'",
        "  a request to the model at http://model-1/v1, made at 0 s",
    ]
    await assert_nothing_left(virtual_lumos, within=30)


async def test_a_long_run_is_shown_without_its_middle(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    virtual_lumos.add_agent("helper", replay.text("word " * 50))
    run = await virtual_lumos.chat("helper")
    with pytest.raises(AssertionError, match=r"was not stopped\n(.*\n)+ +… \d+ more …\n(.*\n){5}.*\"done\""):
        assert_stopped(run)
