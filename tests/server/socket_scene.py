"""What is said and heard on sockets to Lumos in memory."""

from __future__ import annotations

from typing import Any

from engine import Run
from tests.engine.scripted import SENT, Line, ScriptedProvider, text
from tests.harness.websocket_client import WebSocketClient
from tests.harness.world import World


def speaking(*lines: Line) -> ScriptedProvider:
    """A model that was asked at once and says these."""
    return ScriptedProvider((0, (SENT,)), *lines)


def two(world: World) -> None:
    """Two agents that speak by turns, each at its own times."""
    world.add_agent("left", speaking((1, text("l1 ")), (3, text("l2 ")), (5, text("l3"))))
    world.add_agent("right", speaking((2, text("r1 ")), (4, text("r2"))))


async def start(socket: WebSocketClient, agent: str, **fields: Any) -> str:
    """Start a run of that agent; its id."""
    await socket.say("start", request_id=f"to {agent}", agent_id=agent, message="hi", **fields)
    answer = await socket.hear_until("started", request_id=f"to {agent}")
    return str(answer["run_id"])


async def hear_ends(socket: WebSocketClient, *run_ids: str) -> None:
    """Hear until all of these runs have ended."""
    open_runs = set(run_ids)
    while open_runs:
        open_runs.discard((await socket.hear_until("end"))["run_id"])


def events(socket: WebSocketClient, run_id: str) -> list[tuple[int, Any]]:
    """The run's events that were heard, with their numbers."""
    return [(one["seq"], one["event"]) for _, one in socket.heard if one["type"] == "event" and one["run_id"] == run_id]


def assert_whole(socket: WebSocketClient, run: Run, after: int = 0) -> None:
    """All of the run after that number was heard, once, in order, and then its end."""
    heard = events(socket, run.id)
    assert [seq for seq, _ in heard] == list(range(after + 1, run.log.last_seq + 1))
    assert [event["chunk_type"] for _, event in heard] == [
        entry.event.__struct_config__.tag for entry in run.log.entries(after)
    ]
    about = [one["type"] for _, one in socket.heard if one.get("run_id") == run.id]
    assert about[-1] == "end"
    assert about.count("end") == 1


def find(world: World, run_id: str) -> Run:
    run = world.supervisor.find(run_id)
    assert run is not None
    return run


def ended(socket: WebSocketClient) -> set[str]:
    """The runs whose end was heard."""
    return {one["run_id"] for _, one in socket.heard if one["type"] == "end"}


async def refusal(socket: WebSocketClient, kind: str, **fields: Any) -> dict[str, Any]:
    """What the refusal of that message says, without its texts."""
    await socket.say(kind, **fields)
    answer = await socket.hear_until("error")
    assert answer["message"]
    return {name: answer[name] for name in ("code", "request_id", "run_id") if name in answer}
