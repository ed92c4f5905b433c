"""Whatever a simulated tool does, the agent of a simulated vendor that calls it comes to its end."""

from __future__ import annotations

from typing import get_args

import pytest
import trio
from trio.testing import MockClock

from engine import BasicAgent, Deadlines, Event, GenerationComplete, StreamingAgent, StreamingConfig
from engine.events import ToolCallComplete
from engine.tools import MAX_RESULT_BYTES, ToolUse
from providers.http import open_client
from providers.openai_chat import OpenAIChatProvider
from server.simulation.plan import AnswerPlan, ReplyPlan, ToolManner, ToolPlan, VendorPlan
from server.simulation.replies import reply_text
from server.simulation.tools import simulated_tools
from server.simulation.trace import Trace
from server.simulation.vendors import Vendor
from server.testing.memory_network import MemoryNetwork

TOOL_SECONDS = 7.0
REPLY = ReplyPlan(first_after=1.0, seconds=0.0, tools=("helper",))
MODEL_SECONDS = 2.0


async def use_tool(manner: ToolManner, trace: Trace) -> tuple[list[Event], float]:
    """The events of a run whose model calls the tool once, and how long it took."""
    network = MemoryNetwork()
    tools = simulated_tools([ToolPlan(name="helper", manner=manner, seconds=3.0)], trace)
    async with trio.open_nursery() as nursery:
        vendor = Vendor(VendorPlan(answers=(AnswerPlan(reply=REPLY),)), 0, [], trace)
        vendor.start(nursery, network.listen("vendor", 80))
        client = open_client(network.connect)
        agent = BasicAgent(
            agent_id="a",
            provider=OpenAIChatProvider(base_url="http://vendor/v1", api_key="k", client=client),
            model="m",
            tool_use=ToolUse(tools=tuple(tools.values())),
            deadlines=Deadlines(tool=TOOL_SECONDS),
        )
        async with StreamingAgent(agent, StreamingConfig()).execute_streaming("hi") as stream:
            events = [event async for event in stream]
            ended_at = trio.current_time()
        await client.aclose()
        nursery.cancel_scope.cancel()
    return events, ended_at


FAILED: dict[ToolManner, str] = {
    "hangs": "timed out",
    "raises": "helper failed",
    "raises_group": "runtimeerror: one",
    "raises_base": "collapse",
    "swallows_cancel": "timed out",
    "fails_in_cleanup": "timed out",
}
SECONDS: dict[ToolManner, float] = {
    "slow": 3.0,
    "hangs": TOOL_SECONDS,
    "swallows_cancel": TOOL_SECONDS,
    "fails_in_cleanup": TOOL_SECONDS,
}


@pytest.mark.parametrize("manner", get_args(ToolManner))
async def test_a_run_goes_on_whatever_its_tool_does(autojump_clock: MockClock, manner: ToolManner) -> None:
    trace = Trace()
    events, seconds = await use_tool(manner, trace)
    (told,) = [event for event in events if isinstance(event, ToolCallComplete)]
    assert isinstance(events[-1], GenerationComplete)
    assert events[-1].response.endswith(reply_text(REPLY))
    assert seconds == MODEL_SECONDS + SECONDS.get(manner, 0.0)
    assert told.status == ("Error" if manner in FAILED else told.status)
    assert FAILED.get(manner, "") in str(told.result).lower()
    assert len(str(told.result)) <= MAX_RESULT_BYTES + 1000
    assert "tool helper" in trace.text()


async def test_a_tool_tells_what_it_was_asked(autojump_clock: MockClock) -> None:
    trace = Trace()
    events, _ = await use_tool("returns", trace)
    (told,) = [event for event in events if isinstance(event, ToolCallComplete)]
    assert (told.status, told.result) == ("Success", {"tool": "helper", "of": '{"question":"6*7"}'})


async def test_who_swallows_its_cancellation_goes_on_for_its_seconds(autojump_clock: MockClock) -> None:
    trace = Trace()
    await use_tool("swallows_cancel", trace)
    called, late = (line.split() for line in trace.lines if " tool helper " in line)
    assert (called[3], late[3]) == ("called", "returned")
    assert float(late[0]) == 1.0 + TOOL_SECONDS + 3.0
