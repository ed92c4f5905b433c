"""What the author of a client relies on: each message has its answer, each refusal its code, and nothing is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import trio
from trio.testing import MockClock

from engine import RetentionLimits
from server.admission import Admission, AdmissionLimits
from server.requests import MAX_MESSAGE_CHARS, ChatRequest
from server.socket_messages import ClientMessage, End, ServerMessage
from tests.engine.scripted import FOREVER, text
from tests.harness.websocket_client import WebSocketClient, open_socket
from tests.harness.world import open_keeping_world, open_world
from tests.server.api_scene import API
from tests.server.socket_scene import assert_whole, ended, events, find, hear_ends, refusal, speaking, start, two

PAGE = Path(__file__).parents[2] / "docs" / "socket.md"
UNKNOWN = "z" * 22
FORGET_AT_ONCE = RetentionLimits(seconds=0.0, runs=0)


def one_at_a_time(queue: int) -> Admission:
    return Admission(AdmissionLimits(runs=1, queue=queue, queue_seconds=60.0))


async def ask(socket: WebSocketClient, kind: str, **fields: Any) -> dict[str, Any]:
    """The answer that repeats the message's ``request_id``."""
    await socket.say(kind, request_id="mine", **fields)
    while True:
        answer: dict[str, Any] = await socket.hear()
        if answer.pop("request_id", None) == "mine":
            return answer


async def test_every_answer_repeats_the_messages_name(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        run_id = (await ask(socket, "start", agent_id="left", message="hi"))["run_id"]
        assert await ask(socket, "ping", data="x") == {"type": "pong", "data": "x"}
        assert await ask(socket, "unsubscribe", run_id=run_id) == {"type": "unsubscribed", "run_id": run_id}
        assert await ask(socket, "subscribe", run_id=run_id) == {"type": "subscribed", "run_id": run_id, "after": 0}
        twice = await ask(socket, "subscribe", run_id=run_id)
        assert (twice["code"], twice["run_id"]) == ("CONFLICT", run_id)
        assert await ask(socket, "stop", run_id=run_id) == {"type": "stopped", "run_id": run_id, "status": "stop"}
        for kind in ("stop", "subscribe"):
            answer = await ask(socket, kind, run_id=UNKNOWN)
            assert (answer["code"], answer["run_id"]) == ("NOT_FOUND", UNKNOWN)
        answer = await ask(socket, "subscribe", run_id=UNKNOWN, after="x")
        assert (answer["code"], answer["run_id"]) == ("VALIDATION_ERROR", UNKNOWN)
        assert (await ask(socket, "dance"))["code"] == "VALIDATION_ERROR"


@pytest.mark.parametrize("request_id", ["", "x" * 101, 7])
async def test_a_name_that_cannot_be_is_refused(request_id: object, autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        answer = await socket.ask("ping", request_id=request_id)
        assert (answer["code"], "request_id" in answer) == ("VALIDATION_ERROR", False)


async def test_unsubscribing_a_run_that_is_not_subscribed_changes_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        assert await socket.ask("unsubscribe", run_id=UNKNOWN) == {"type": "unsubscribed", "run_id": UNKNOWN}


async def test_a_chat_that_is_too_long_is_refused_as_over_http(autojump_clock: MockClock) -> None:
    async with open_world() as world, open_socket(world) as socket:
        two(world)
        answer = await ask(socket, "start", agent_id="left", message="x" * (MAX_MESSAGE_CHARS + 1))
        assert answer["code"] == "PAYLOAD_TOO_LARGE"


# Who leaves


@pytest.mark.parametrize(
    ("on_disconnect", "ends_at", "status"), [("cancel", 2.0, "stop"), ("grace", 7.0, "stop"), ("continue", 9.0, "done")]
)
async def test_to_unsubscribe_is_to_leave_as_a_reader(
    on_disconnect: str, ends_at: float, status: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world, open_socket(world) as socket:
        world.add_agent("a", speaking((1, text("x")), (9, text("y"))))
        run_id = await start(socket, "a", on_disconnect=on_disconnect)
        await trio.sleep_until(2)
        await socket.say("unsubscribe", run_id=run_id)
        await find(world, run_id).log.wait_ended()
        assert trio.current_time() == ends_at
        assert await socket.hear_until("unsubscribed")
        assert (await ask(socket, "stop", run_id=run_id))["status"] == status
        await socket.say("subscribe", run_id=run_id)
        await hear_ends(socket, run_id)


async def test_a_start_whose_socket_has_gone_starts_nothing(autojump_clock: MockClock) -> None:
    """It waited for a place, and gives it up."""
    async with open_world(admission=one_at_a_time(queue=5)) as world, open_socket(world) as other:
        world.add_agent("a", speaking((5, text("x"))))
        run_id = await start(other, "a")
        async with open_socket(world) as socket:
            await socket.say("start", request_id="r", agent_id="a", message="hi", on_disconnect="continue")
            await trio.sleep(1)
        await hear_ends(other, run_id)
        await trio.sleep(10)
        assert [what for what, _, _ in world.journal.entries].count("started") == 1


# In which order


async def test_messages_are_dealt_with_in_turn_and_starts_beside_them(autojump_clock: MockClock) -> None:
    async with open_world(admission=one_at_a_time(queue=5)) as world, open_socket(world) as socket:
        world.add_agent("a", speaking((5, text("x"))))
        first = await start(socket, "a")
        await socket.say("start", request_id="waits", agent_id="a", message="hi")
        for number in range(3):
            await socket.say("ping", data=str(number))
        assert [await socket.hear_until("pong") for _ in range(3)] == [
            {"type": "pong", "data": str(number)} for number in range(3)
        ]
        assert trio.current_time() == 0
        started = await socket.hear_until("started", request_id="waits")
        assert trio.current_time() == 5
        await hear_ends(socket, *({first, started["run_id"]} - ended(socket)))


async def test_a_full_server_says_when_to_come_again(autojump_clock: MockClock) -> None:
    async with open_world(admission=one_at_a_time(queue=0)) as world, open_socket(world) as socket:
        world.add_agent("a", speaking((FOREVER, ())))
        await start(socket, "a")
        answer = await ask(socket, "start", agent_id="a", message="hi")
        assert (answer["code"], answer["retry_after"]) == ("SERVICE_UNAVAILABLE", 5)


# What is gone


async def test_a_run_whose_events_are_gone_tells_its_state_alone(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=FORGET_AT_ONCE) as world, open_socket(world) as socket:
        two(world)
        run_id = await start(socket, "left")
        await hear_ends(socket, run_id)
        await trio.sleep(10)
        assert (await world.client.delete(f"{API}/runs/{run_id}")).status_code == 204
        gone = await ask(socket, "subscribe", run_id=run_id)
        assert (gone["code"], gone["run_id"]) == ("GONE", run_id)
        assert gone["details"] == {"run_id": run_id, "status": "done", "state": f"/api/v1/runs/{run_id}"}
        assert await ask(socket, "stop", run_id=run_id) == {"type": "stopped", "run_id": run_id, "status": "done"}


async def test_an_ended_run_is_read_from_the_store(autojump_clock: MockClock) -> None:
    async with open_keeping_world(retention=FORGET_AT_ONCE) as world, open_socket(world) as socket:
        two(world)
        run_id = await start(socket, "left")
        run = find(world, run_id)
        await hear_ends(socket, run_id)
        await trio.sleep(10)
        assert world.supervisor.find(run_id) is None
        async with open_socket(world) as other:
            await other.say("subscribe", run_id=run_id, after=2)
            await hear_ends(other, run_id)
            assert_whole(other, run, after=2)
            last = events(other, run_id)[-1][0]
            assert await refusal(other, "subscribe", run_id=run_id, after=last + 1) == {
                "code": "INVALID_CURSOR",
                "run_id": run_id,
            }


# The page


def test_the_page_names_every_message_and_field() -> None:
    said, _, heard = PAGE.read_text().partition("## What you hear")
    for kinds, page in ((get_args(ClientMessage), said), ((*get_args(ServerMessage), End), heard)):
        rows = [line for line in page.splitlines() if line.startswith("| `")]
        for kind in kinds:
            row = next(row for row in rows if f"`{kind.__struct_config__.tag}`" in row.split("|")[1])
            fields = {*kind.__struct_fields__} - {*ChatRequest.__struct_fields__}
            fields -= set() if page is heard else {"request_id"}
            assert [field for field in sorted(fields) if f"`{field}`" not in row] == []
