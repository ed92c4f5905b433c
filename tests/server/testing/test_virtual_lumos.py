"""The world that users get: their agents behind the real server, with times as exact as their recordings."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from engine import AgentStarted, BasicAgent, GenerationComplete, Owner, TextDelta
from engine.function_tool import tool
from engine.tools import ToolContext, ToolUse
from providers.openai_chat import OpenAIChatProvider
from providers.recording import dump
from server.agents import AgentsFileError
from server.settings import ServerSettings
from server.testing import (
    Answer,
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
from server.testing.tools import InlineToolRegistry


def double(number: int) -> int:
    """Double it."""
    return 2 * number


async def slow_double(number: int) -> int:
    """Double it, slowly."""
    await trio.sleep(2)
    return 2 * number


async def test_an_answer_comes_when_it_was_said(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    await trio.sleep(0.1)  # no time is a round number
    model = virtual_lumos.add_agent("helper", replay.text("Hello big world", first=2.5, every=0.1, usage=(7, 3)))
    run = await virtual_lumos.chat("helper", "What?")
    assert_done(run, "Hello big world", at=2.7)
    assert_ttfb(run, 2.5)
    assert_ttft(run, 2.5)
    assert (run.status_code, run.elapsed) == (200, 2.7)
    assert run.usage is not None
    assert (run.usage.input_tokens, run.usage.output_tokens) == (7, 3)
    assert_events(run, (0, AgentStarted), (2.5, TextDelta), TextDelta(" big", "step-1"), GenerationComplete)
    assert model.calls[0].body["messages"][-1] == {"role": "user", "content": "What?"}
    await assert_nothing_left(virtual_lumos)


async def test_reasoning_counts_as_first_content(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    answer = replay.text("Yes", reasoning="Hm hm", first=1.0, every=1.0)
    virtual_lumos.add_agent("thinker", answer, provider="anthropic")
    run = await virtual_lumos.chat("thinker")
    assert run.reasoning == "Hm hm"
    assert_ttfb(run, 1.0)
    assert_ttft(run, 3.0)


@pytest.mark.parametrize("function", [double, slow_double])
async def test_tools_are_called_in_the_world(virtual_lumos: VirtualLumos, replay: Replay, function: object) -> None:
    name = function.__name__  # type: ignore[attr-defined]
    answers = replay.tool_call(name, {"number": 21}, text="Let me see.", at=1.0), replay.text("It is 42.", first=0.5)
    virtual_lumos.add_agent("helper", *answers, tools=[function])  # type: ignore[list-item]
    run = await virtual_lumos.chat("helper")
    call = assert_tool_called(run, name, arguments={"number": 21}, result=42, failed=False)
    assert (call.started, call.ended) == ((1.0, 1.0) if function is double else (1.0, 3.0))
    assert_done(run, "Let me see.\n\nIt is 42.")


async def test_a_tool_that_hangs_meets_its_deadline(
    virtual_lumos: VirtualLumos, replay: Replay, faults: Faults
) -> None:
    answers = replay.tool_call("double", {"number": 1}, at=1.0), replay.text("Sorry.", first=0.5)
    virtual_lumos.add_agent("helper", *answers, tools=[faults.tool_hangs(double)], deadlines={"tool": 5})
    run = await virtual_lumos.chat("helper")
    assert assert_tool_called(run, "double", failed=True).ended == 6.0
    assert_done(run, "Sorry.", at=6.5)


async def test_a_tool_that_raises_is_a_failed_call(virtual_lumos: VirtualLumos, replay: Replay, faults: Faults) -> None:
    answers = replay.tool_call("double", {"number": 1}), replay.text("Sorry.")
    virtual_lumos.add_agent("helper", *answers, tools=[faults.tool_raises(double)])
    run = await virtual_lumos.chat("helper")
    assert_tool_called(run, "double", failed=True)
    assert_done(run, "Sorry.")


async def test_leaving_ends_the_run_after_its_grace(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    model = virtual_lumos.add_agent("helper", replay.text("one two three four", first=1, every=10))
    async with virtual_lumos.open_chat("helper") as run:
        await run.read(characters=7)
    assert_text(run, "one two")
    assert model.calls[0].under_way
    with pytest.raises(AssertionError, match="1 run"):
        await assert_nothing_left(virtual_lumos)
    await assert_nothing_left(virtual_lumos, within=5)
    assert model.calls[0].closed_at == 16.0
    async with run.resume() as rest:
        await rest.read()
    assert_stopped(rest)


async def test_a_cut_connection_is_resumed(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    virtual_lumos.add_agent("helper", replay.text("one two three four", first=1))
    async with virtual_lumos.open_chat("helper") as run:
        await run.read(events=3)
        run.cut(reset=True)
        await run.read()
        assert run.broken is not None
        async with run.resume() as rest:
            await rest.read()
    assert run.text + rest.text == "one two three four"
    assert_done(rest)


async def test_stop_keeps_the_text(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    virtual_lumos.add_agent("helper", replay.text("one two three", first=1, every=1))
    async with virtual_lumos.open_chat("helper", on_disconnect="cancel") as run:
        await run.read(characters=4)
        response = await run.stop()
        await run.read()
    assert response.status_code == 200
    assert_stopped(run, at=2.0)
    assert_text(run, "one two")
    await assert_nothing_left(virtual_lumos, within=5)
    assert trio.current_time() == 2  # it waits only if there is something left


async def test_slow_and_cut_networks(virtual_lumos: VirtualLumos, replay: Replay, faults: Faults) -> None:
    virtual_lumos.add_agent("helper", replay.text("one two three", first=1))
    run = await virtual_lumos.chat("helper", network=faults.slow_network(0.25))
    assert_ttfb(run, 0.5 + 0.25 + 1 + 0.25)  # the handshake, the request, the model, the answer
    cut = await virtual_lumos.chat("helper", network=faults.cut_network(400))
    assert cut.terminal is None
    assert cut.broken is not None


async def test_agents_of_a_file_ask_the_vendors_themselves(
    virtual_lumos: VirtualLumos, replay: Replay, tmp_path: Path
) -> None:
    (tmp_path / "agents.toml").write_text(
        "[[agent]]\nid='mine'\nsystem='Be brief.'\ntools=['files.double']\nworking_memory={template={}}\n"
        "[agent.llm_config]\nprovider='anthropic'\n"
    )
    virtual_lumos.add_agents_file(tmp_path / "agents.toml")
    virtual_lumos.add_tools("files", double)
    answers = replay.tool_call("files_double", {"number": 4}), replay.text("Eight."), replay.text("As I said.")
    model = virtual_lumos.add_vendor("anthropic", *answers)
    assert model.url == "https://api.anthropic.com"
    assert_done(await virtual_lumos.chat("mine", session_id="s"), "Eight.")
    assert_done(await virtual_lumos.chat("mine", "And?", session_id="s"), "As I said.")
    assert model.calls[0].headers["x-api-key"] == "test-key"
    assert "Eight." in str(model.calls[-1].body["messages"])  # of the session
    with pytest.raises(RuntimeError, match="runs already"):
        virtual_lumos.add_agents_file(tmp_path / "agents.toml")


async def test_an_agent_of_ones_own(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    model = virtual_lumos.add_vendor("openai_compatible", replay.text("Hello"), url="http://vllm:8000/v1")
    provider = OpenAIChatProvider(base_url=model.url, api_key="k", client=virtual_lumos.model_client)
    agent = BasicAgent(agent_id="mine", provider=provider, model="m", tool_use=ToolUse(max_steps=2))
    virtual_lumos.add_agent(agent)
    assert_done(await virtual_lumos.chat("mine"), "Hello")


async def test_an_answer_as_a_provider(virtual_lumos: VirtualLumos, replay: Replay, faults: Faults) -> None:
    provider = replay.text("Hello").provider()
    virtual_lumos.add_agent(BasicAgent(agent_id="mine", provider=provider, model="m"))
    assert_done(await virtual_lumos.chat("mine"), "Hello")
    with pytest.raises(ValueError, match="needs a model server"):
        faults.cut(replay.text("Hello"), after=1).provider()


async def test_recordings_by_name_by_file_and_with_steps(
    virtual_lumos: VirtualLumos, replay: Replay, tmp_path: Path
) -> None:
    short: Answer = replay("gpt4o-short")
    dump(short.recording, tmp_path / "mine.jsonl")
    virtual_lumos.add_agent("short", replay(tmp_path / "mine.jsonl"))
    run = await virtual_lumos.chat("short")
    assert_done(run, short.text, at=short.recording.duration_ns / 1e9)
    steps = replay.steps("demo-tools")
    assert len(steps) == 2


async def test_tools_of_the_server_and_of_packages_take_no_thread() -> None:
    def where() -> int:
        return threading.get_ident()

    (found,) = InlineToolRegistry(built_in={"where": tool(where)}).find(["where"])
    context = ToolContext(
        run_id="r", call_id="c", agent_id="a", owner=Owner(), memory=None, memory_updated=lambda _key, _operation: None
    )
    assert (await found.call("{}", context)).value == threading.get_ident()


async def test_the_rest_of_the_surface(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    assert (await virtual_lumos.client.get("/health/ready")).status_code == 200
    virtual_lumos.add_agent("helper", replay.text("Hello"))
    response = await virtual_lumos.client.post("/api/v1/agents/helper/chat/lumosai", json={"message": "Hi"})
    assert response.json()["data"]["content"] == "Hello"
    unknown = await virtual_lumos.chat("nobody")
    assert unknown.status_code == 404
    with pytest.raises(AssertionError, match=r"did not come to its end\n.*\n  HTTP 404\n  \{'code': 'NOT_FOUND'"):
        assert_done(unknown)


async def test_settings_are_the_servers(replay: Replay, autojump_clock: trio.testing.MockClock) -> None:
    async with VirtualLumos(ServerSettings(resume_grace=0.0)) as lumos:
        lumos.add_agent("helper", replay.text("one two", first=1, every=10))
        async with lumos.open_chat("helper") as run:
            await run.read(characters=3)
        await assert_nothing_left(lumos)


async def test_what_cannot_be_is_said(virtual_lumos: VirtualLumos, replay: Replay, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        virtual_lumos.add_agent("helper")
    with pytest.raises(ValueError, match="there is no provider 'nobody'"):
        virtual_lumos.add_vendor("nobody", replay.text("x"))
    with pytest.raises(ValueError, match="azure has no URL"):
        virtual_lumos.add_vendor("azure", replay.text("x"))
    virtual_lumos.add_vendor("openai", replay.text("x"))
    with pytest.raises(OSError, match=r"api\.openai\.com:443 already"):
        virtual_lumos.add_vendor("openai_responses", replay.text("x"))
    (tmp_path / "agents.toml").write_text("[[agent]]\nid='a'\nllm_config={provider='azure'}\n")
    virtual_lumos.add_agents_file(tmp_path / "agents.toml")
    with pytest.raises(AgentsFileError, match="'a'"):
        await virtual_lumos.chat("a")


async def fail_in(lumos: VirtualLumos) -> None:
    async with lumos, lumos.open_chat("helper"):
        raise ZeroDivisionError


async def test_the_world_is_closed_before_and_after(replay: Replay, autojump_clock: trio.testing.MockClock) -> None:
    lumos = VirtualLumos()
    with pytest.raises(RuntimeError, match="while the test itself runs"):
        await lumos.chat("demo")
    lumos.add_agent("helper", replay.text("one two", every=100))
    with pytest.raises(ZeroDivisionError):  # bare, in no group
        await fail_in(lumos)
    assert lumos.network.open_connections() == []


async def test_a_real_clock_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs a clock that jumps"):
        async with VirtualLumos():
            pass


async def test_an_outer_deadline_ends_what_is_in_the_world(virtual_lumos: VirtualLumos, replay: Replay) -> None:
    virtual_lumos.add_agent("helper", replay.text("one two", every=50))
    with trio.move_on_after(10) as scope:
        await virtual_lumos.chat("helper")
    assert scope.cancelled_caught
    assert trio.current_time() == 10
    await assert_nothing_left(virtual_lumos, within=5)


async def test_a_vendor_refuses_in_its_own_words(virtual_lumos: VirtualLumos, faults: Faults) -> None:
    virtual_lumos.add_agent("helper", faults.status(429, retry_after=20, message="slow down"))
    run = await virtual_lumos.chat("helper")
    assert_error(run, "upstream.rate_limit", at=0)
    assert getattr(run.terminal, "retry_after", None) == 20
