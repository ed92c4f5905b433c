"""Stops and disconnects in every phase of a run, on every chat route: when it ends, and what is kept of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import AgentStopped, Run, ToolUse
from engine.function_tool import tool
from engine.memory import MemoryUse, Owner
from server.memory import MemoryStore, StoredMemory
from server.store.history import list_messages
from server.store.rows import Scope
from server.store.turns import find_run
from tests.engine.scripted import SENT, Line, ScriptedProvider, StepwiseProvider, calling, saying, text
from tests.harness.world import World, open_keeping_world, open_world
from tests.server.api_scene import API, Caller
from tests.server.raw_http import chat_request, raw_client

ROUTES = {"stream": "/agents/demo/chat/lumosai/stream", "whole": "/agents/demo/chat/lumosai"}
ROUTES["simulated"] = f"{ROUTES['whole']}/simulated"
GRACES = {"cancel": 0.0, "grace": 5.0, "continue": inf}
SENT_AT = 1.0
PHASES = {
    "while it connects": (0.5, ""),
    "before the first token": (2.5, ""),
    "in the answer": (4.5, "one "),
    "in a tool": (8.0, "one two "),
}
TOOL_SECONDS = 20.0
END = 6.0 + TOOL_SECONDS + 1.0


class Scene:
    """A world whose agent answers, calls a slow tool, and answers again; ``tool_ends`` tells what became of that."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tool_ends: list[tuple[float, str]] = []
        self.caller = Caller(world)
        first: list[Line] = [(SENT_AT, (SENT,)), (4, text("one ")), (5, text("two ")), *calling("c ponder {}", at=6)]
        self.provider = StepwiseProvider(first, saying("three", at=1))

        @tool
        async def ponder() -> str:
            """Take long."""
            try:
                await trio.sleep(TOOL_SECONDS)
            except trio.Cancelled:
                self.tool_ends.append((trio.current_time(), "cancelled"))
                raise
            self.tool_ends.append((trio.current_time(), "done"))
            return "pondered"

        assert world.database is not None
        store = MemoryStore(world.database)

        def remember(owner: Owner) -> MemoryUse:
            scope = Scope(owner.tenant_id, owner.user_id, "demo")
            return MemoryUse(memory=StoredMemory(store, scope, owner.session_id))

        world.add_agent(provider=self.provider, tool_use=ToolUse(tools=(ponder,)), memories=remember)

    async def ask(self, route: str, **body: Any) -> Any:
        return await self.caller.ask("POST", ROUTES[route], json={"message": "hi"} | body)

    @property
    def run(self) -> Run:
        """The only run."""
        run = self.world.supervisor.find(self.world.journal.entries[0][1])
        assert run is not None
        return run

    async def assert_ended(self, at: float, reason: str, response: str) -> None:
        """The run was ended at that time, and the log, the store and the state tell the same."""
        run = self.run
        assert self.world.journal.entries[-1] == ("ended", run.id, at)
        assert [what for what, _, _ in self.world.journal.entries].count("ended") == 1
        terminal = run.log.terminal
        assert isinstance(terminal, AgentStopped)
        assert (terminal.reason, terminal.response) == (reason, response)
        if at < SENT_AT:
            assert terminal.usage is None
        else:
            assert terminal.usage is not None
            assert terminal.usage.estimated
            assert terminal.usage.input_tokens > 0
            assert (terminal.usage.output_tokens > 0) == bool(response)
        await trio.sleep(0.5)
        assert self.world.database is not None
        row = await self.world.database.read(find_run, run.id)
        assert row is not None
        assert (row.status, row.reason, row.response, row.terminal_seq) == ("stop", reason, response, run.log.last_seq)
        assert row.usage == terminal.usage
        state = await self.caller.data("GET", f"/runs/{run.id}")
        assert (state["status"], state["response"], state["terminal"]["reason"]) == ("stop", response, reason)
        scope = Scope(row.tenant_id, row.user_id, "demo")
        kept = await self.world.database.read(list_messages, scope, None, 10, 0)
        answered = [(message.content, message.partial) for message in kept if message.role == "assistant"]
        assert "".join(content for content, _ in answered) == response
        assert not answered or answered[-1][1]


@asynccontextmanager
async def open_scene() -> AsyncIterator[Scene]:
    async with open_keeping_world() as world:
        yield Scene(world)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("on_disconnect", GRACES)
@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_leaves_ends_the_run_after_its_grace(
    route: str, on_disconnect: str, phase: str, autojump_clock: MockClock
) -> None:
    left_at, said = PHASES[phase]
    async with open_scene() as scene:
        with trio.move_on_after(left_at):
            await scene.ask(route, on_disconnect=on_disconnect)
        await trio.sleep(60)
        ended_at = left_at + GRACES[on_disconnect]
        if ended_at > END:
            assert scene.run.response.split() == ["one", "two", "three"]
            assert scene.tool_ends == [(6 + TOOL_SECONDS, "done")]
            return
        if on_disconnect == "grace":
            said = "one two " if ended_at > 5 else said
        await scene.assert_ended(ended_at, "disconnect", said)
        assert scene.tool_ends == ([(ended_at, "cancelled")] if ended_at > 6 else [])
        assert len(scene.provider.requests) == 1


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("route", ROUTES)
async def test_a_stop_ends_the_run_at_once_for_whoever_reads_it(
    route: str, phase: str, autojump_clock: MockClock
) -> None:
    stopped_at, said = PHASES[phase]
    async with open_scene() as scene:

        async def stop() -> None:
            await trio.sleep(stopped_at)
            for _ in range(3):
                state = await scene.caller.data("POST", f"/runs/{scene.run.id}/stop")
                assert (state["status"], state["response"]) == ("stop", said)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            response = await scene.ask(route)
            assert trio.current_time() == stopped_at
        assert response.status_code == 200
        if route == "whole":
            data = response.json()["data"]
            assert (data["content"], data["finish_reason"]) == (said, "stopped")
        else:
            assert response.content.count(b'"chunk_type":"stop"') == 1
        await scene.assert_ended(stopped_at, "requested", said)
        assert scene.tool_ends == ([(stopped_at, "cancelled")] if stopped_at > 6 else [])


@pytest.mark.parametrize("route", ["stream", "whole"])
async def test_a_reader_that_returns_in_time_cancels_the_cancelling(route: str, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        with trio.move_on_after(8):
            await scene.ask(route)
        await trio.sleep(4.9)
        headers = {"Last-Event-ID": f"{scene.run.id}.1"}
        response = await scene.caller.ask("POST", ROUTES[route], json={"message": "hi"}, headers=headers)
        assert response.status_code == 200
        assert trio.current_time() == END
        assert scene.run.response.split() == ["one", "two", "three"]


async def test_of_two_readers_the_last_that_leaves_counts(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:

        async def join_whole(until: float) -> None:
            headers = {"Idempotency-Key": "once"}
            with trio.CancelScope(deadline=until):
                await scene.caller.ask("POST", ROUTES["whole"], json={"message": "hi"}, headers=headers)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join_whole, 3.0)
            nursery.start_soon(join_whole, 9.0)
        await trio.sleep(60)
        await scene.assert_ended(14.0, "disconnect", "one two ")


async def test_a_stop_wins_over_a_completion_that_comes_later_and_changes_nothing_after_one(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.ask, "whole")
            await trio.sleep(END - 0.01)
            await scene.caller.data("POST", f"/runs/{scene.run.id}/stop")
        await trio.sleep(1)
        assert isinstance(scene.run.log.terminal, AgentStopped)
        last = scene.run.log.last_seq
        await scene.caller.data("POST", f"/runs/{scene.run.id}/stop")
        assert scene.run.log.last_seq == last


BIG: tuple[Line, ...] = ((0, (SENT,)), *((1 + number, text("x" * 10_000)) for number in range(100)))


@pytest.mark.parametrize("on_disconnect", ["cancel", "grace"])
@pytest.mark.parametrize("how", ["close", "stop"])
async def test_a_client_that_does_not_read_is_one_that_can_leave_and_be_stopped(
    how: str, on_disconnect: str, autojump_clock: MockClock
) -> None:
    async with open_world(window=65_536) as world:
        provider = ScriptedProvider(*BIG)
        world.add_agent(provider=provider)
        async with raw_client(world) as client:
            await client.stream.send_all(chat_request(on_disconnect=on_disconnect))
            await trio.sleep(12.5)  # its window has been full for five seconds
            run = world.supervisor.find(world.journal.entries[0][1])
            assert run is not None
            if how == "stop":
                await world.client.post(f"{API}/runs/{run.id}/stop")
                assert run.log.ended
        ended_at = 12.5 + (GRACES[on_disconnect] if how == "close" else 0.0)
        await trio.sleep(30)
        assert world.journal.entries[-1] == ("ended", run.id, ended_at)
        assert provider.seen[-1] == (ended_at, "cancelled")
        assert isinstance(run.log.terminal, AgentStopped)
        assert run.log.terminal.reason == ("requested" if how == "stop" else "disconnect")
        assert run.log.terminal.response == "x" * 10_000 * int(ended_at)
        assert run.log.readers == 0
