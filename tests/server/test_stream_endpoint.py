"""The endpoints on the virtual clock: frames, headers, heartbeats, stream options, whole answers, run state, health."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import (
    AgentStopped,
    Deadlines,
    Error,
    Event,
    GenerationComplete,
    Metadata,
    ProviderError,
    StreamingConfig,
    TextDelta,
    UsagePiece,
)
from engine.pieces import FinishPiece
from providers.sse import SSEParser
from server.app import API
from tests.engine.scripted import FOREVER, SENT, Line, ScriptedProvider, text
from tests.harness.world import STREAM_URL, World, open_world

BASE = "http://lumos"
WHOLE_URL = f"{BASE}{API}/agents/demo/chat/lumosai"
SIMULATED_URL = f"{WHOLE_URL}/simulated"
HEARTBEAT = b": heartbeat\n\n"

HELLO: tuple[Line, ...] = ((0, (SENT,)), (1, text("Hel")), (2, text("lo")), (3, (UsagePiece(7, 2),)))

decode_event = msgspec.json.Decoder(Event).decode


def words(count: int, *, gap: float = 1.0, first: float = 1.0) -> tuple[Line, ...]:
    """One word each ``gap`` seconds."""
    return ((0, (SENT,)), *((first + number * gap, text(f"word{number} ")) for number in range(count)))


async def body_parts(response: httpx.Response) -> AsyncIterator[tuple[float, bytes]]:
    """Everything that each read of the body brought, heartbeats too, with its time."""
    body = response.extensions["body"]
    while part := await body.receive():
        yield trio.current_time(), part


async def timed_parts(world: World, url: str = STREAM_URL, **body: Any) -> list[tuple[float, bytes]]:
    """A chat's whole body in parts, each with its time since the request."""
    asked_at = trio.current_time()
    async with world.client.stream("POST", url, json={"message": "hi"} | body) as response:
        return [(at - asked_at, part) async for at, part in body_parts(response)]


def events_in(body: bytes) -> list[Event]:
    """The events of a body."""
    return [decode_event(frame.data) for frame in SSEParser().feed(body)]


def text_of(events: list[Event]) -> str:
    """All that the events say."""
    return "".join(event.content for event in events if isinstance(event, TextDelta))


async def start_in_background(world: World, **body: Any) -> str:
    """Start a chat that nobody reads and nobody waits for; the run's id."""
    async with world.open_chat(on_disconnect="continue", **body) as answer:
        return answer.run_id


def run_url(run_id: str, rest: str = "") -> str:
    """A run's URL."""
    return f"{BASE}{API}/runs/{run_id}{rest}"


# Frames and headers


async def test_a_stream_is_these_bytes(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO))
        async with world.client.stream("POST", STREAM_URL, json={"message": "hi"}) as response:
            body = b"".join([part async for _, part in body_parts(response)]).decode()
        run_id = response.headers["X-Run-Id"]
        timestamp = re.search(r'"timestamp":"([^"]+)"', body)
        assert timestamp is not None
        usage = '"usage":{"input_tokens":7,"output_tokens":2}'
        data = [
            f'{{"chunk_type":"start","agent_id":"demo","run_id":"{run_id}","timestamp":"{timestamp[1]}"}}',
            '{"chunk_type":"content","content":"Hel","step_id":"step-1"}',
            '{"chunk_type":"content","content":"lo","step_id":"step-1"}',
            f'{{"chunk_type":"usage",{usage}}}',
            '{"chunk_type":"step_complete","step_type":"Final","step_id":"step-1"}',
            '{"chunk_type":"done","response":"Hello","total_steps":1,"elapsed_ms":3000.0,"ttfb_ms":1000.0,'
            + usage
            + "}",
        ]
        frames = [f"id: {run_id}.{seq}\ndata: {line}\n\n" for seq, line in enumerate(data, 1)]
        assert body == "retry: 1000\n" + "".join(frames)


@pytest.mark.parametrize("path", [f"{API}/agents", "/api/agents"])
async def test_a_stream_has_these_headers(path: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO))
        url = f"{BASE}{path}/demo/chat/lumosai/stream"
        async with world.client.stream("POST", url, json={"message": "hi"}) as response:
            headers = dict(response.headers)
            run_id = headers.pop("x-run-id")
            del headers["date"]
            assert response.status_code == 200
            assert headers == {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache, no-transform",
                "x-accel-buffering": "no",
                "location": f"{API}/runs/{run_id}/events",
                "x-session-id": "default",
                "transfer-encoding": "chunked",
            }
            assert re.fullmatch(r"[\w-]{22}", run_id, re.ASCII)


async def test_the_head_and_the_first_event_do_not_wait_for_the_model(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((FOREVER, ())))
        async with world.open_chat() as answer:
            first = await answer.response.extensions["body"].receive()
            assert first.startswith(f"retry: 1000\nid: {answer.run_id}.1\n".encode())
            assert trio.current_time() == answer.asked_at


async def test_ids_are_dense_and_only_the_first_frame_sets_retry(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(500, gap=0.01)))
        body = b"".join(part for _, part in await timed_parts(world))
        frames = body.decode().split("\n\n")[:-1]
        fields = [[line.partition(":")[0] for line in frame.splitlines()] for frame in frames]
        assert fields == [["retry", "id", "data"]] + [["id", "data"]] * (len(frames) - 1)
        seqs = [int(seq) for seq in re.findall(r"^id: \S+\.(\d+)$", body.decode(), re.MULTILINE)]
        assert seqs == list(range(1, len(frames) + 1))
        assert len(frames) > 500


async def test_characters_outside_ascii_arrive_as_they_are(autojump_clock: MockClock) -> None:
    said = "日本語 🧵\u2028\u0085 é\r\n\0"
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text(*said))))
        answer = await world.chat()
        assert text_of(answer.events) == said


# Heartbeats


async def test_a_heartbeat_comes_every_15_seconds_of_silence(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        slow = Deadlines(first_token=100, idle=100)
        world.add_agent(
            provider=ScriptedProvider((0, (SENT,)), (40, text("a")), (50, text("b")), (90, ())), deadlines=slow
        )
        parts = await timed_parts(world)
        assert [at for at, part in parts if part == HEARTBEAT] == [15, 30, 55 + 10, 80]
        assert [at for at, part in parts if part != HEARTBEAT] == [0, 40, 50, 90]


async def test_a_resumed_reader_gets_heartbeats_from_its_own_acceptance_on(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((0, (SENT,)), (25, text("a"))))
        run_id = await start_in_background(world)
        await trio.sleep(7)
        async with world.client.stream("GET", run_url(run_id, "/events?after=1")) as response:
            parts = [(at, part == HEARTBEAT) async for at, part in body_parts(response)]
        # The words and the end, of one instant, come in one read or in two: the scheduler decides.
        assert sorted(set(parts)) == [(22, True), (25, False)]


# What a request may set


async def delta_times(world: World, **stream: Any) -> list[tuple[float, str]]:
    answer = await world.chat(stream=stream)
    pairs = zip(answer.arrivals, answer.events, strict=True)
    return [(at - answer.asked_at, event.content) for at, event in pairs if isinstance(event, TextDelta)]


async def test_text_buffer_size_gathers_that_many_characters(autojump_clock: MockClock) -> None:
    letters = [(1 + number / 1024, text("x")) for number in range(31)]
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*letters, (9, ())))
        deltas = await delta_times(world, text_buffer_size=10)
        assert deltas == [(1, "x"), (1 + 10 / 1024, "x" * 10), (1 + 20 / 1024, "x" * 10), (1 + 30 / 1024, "x" * 10)]


async def test_gathered_text_waits_50_ms_at_most(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("a")), (2, text("b")), (2.03125, text("c")), (9, ())))
        assert await delta_times(world, text_buffer_size=1000) == [(1, "a"), (2.05, "bc")]


async def test_a_delay_keeps_deltas_apart(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(4, gap=0.05), (9, ())))
        deltas = await delta_times(world, text_delta_delay_ms=125)
        assert deltas == [(1, "word0 "), (1.125, "word1 word2 "), (1.25, "word3 ")]


@pytest.mark.parametrize(("agent_says", "request_says", "sent"), [(False, True, 2), (True, False, 0), (True, None, 2)])
async def test_metadata_is_sent_if_the_request_or_else_the_agent_says_so(
    agent_says: bool, request_says: bool | None, sent: int, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO), streaming=StreamingConfig(emit_metadata=agent_says))
        answer = await world.chat(stream={"emit_metadata": request_says})
        metadata = [event for event in answer.events if isinstance(event, Metadata)]
        assert metadata == [Metadata("run_id", answer.run_id), Metadata("streaming_mode", "direct")][:sent]


# The whole answer


async def test_a_whole_answer_has_the_shape_of_the_old_system(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO))
        response = await world.client.post(WHOLE_URL, json={"message": "hi"})
        run_id = response.headers["X-Run-Id"]
        assert response.status_code == 200
        assert response.json() == {
            "success": True,
            "data": {
                "message_id": run_id,
                "content": "Hello",
                "memories_updated": False,
                "memories_count": 0,
                "processing_time_ms": 3000.0,
                "run_id": run_id,
                "usage": {"input_tokens": 7, "output_tokens": 2},
                "finish_reason": None,
            },
        }
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["Location"] == f"{API}/runs/{run_id}/events"
        assert trio.current_time() == 3


async def test_a_whole_answer_says_why_the_model_ended(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("cut o")), (2, (FinishPiece("length"),))))
        response = await world.client.post(WHOLE_URL, json={"message": "hi"})
        assert response.json()["data"]["finish_reason"] == "length"


@pytest.mark.parametrize(("retry_after", "header"), [(None, None), (0.0, "0"), (2.25, "3")])
async def test_a_failed_whole_answer_says_when_to_come_again(
    retry_after: float | None, header: str | None, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        failure = ProviderError("upstream.rate_limit", "slow down", retry_after=retry_after)
        world.add_agent(provider=ScriptedProvider((1, failure)))
        response = await world.client.post(WHOLE_URL, json={"message": "hi"})
        assert (response.status_code, response.headers.get("Retry-After")) == (503, header)


@pytest.mark.parametrize(
    ("failure", "status", "code", "message"),
    [
        (ProviderError("upstream.overloaded", "the model is overloaded"), 503, "upstream.overloaded", None),
        (ZeroDivisionError("a bug"), 500, "internal", "internal error"),
    ],
)
async def test_a_failed_whole_answer_is_an_http_error_with_the_events_code(
    failure: Exception, status: int, code: str, message: str | None, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text("so far")), (2, failure)))
        response = await world.client.post(WHOLE_URL, json={"message": "hi"})
        error = response.json()
        assert response.status_code == status
        assert list(error) == ["code", "message", "details", "timestamp"]
        assert (error["code"], error["message"]) == (code, message or str(failure))
        assert error["details"] == {"run_id": world.journal.entries[0][1], "response": "so far"}


async def test_a_whole_answer_that_takes_long_is_answered(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(
            provider=ScriptedProvider((0, (SENT,)), (93, text("at last"))), deadlines=Deadlines(first_token=100)
        )
        response = await world.client.post(WHOLE_URL, json={"message": "hi"})
        assert response.json()["data"]["content"] == "at last"
        assert trio.current_time() == 93


@pytest.mark.parametrize(("on_disconnect", "ended_at"), [("cancel", 3.5), ("grace", 8.5)])
async def test_a_client_that_leaves_a_whole_answer_ends_the_run(
    on_disconnect: str, ended_at: float, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        provider = ScriptedProvider(*words(100))
        world.add_agent(provider=provider)
        with trio.move_on_after(3.5):
            await world.client.post(WHOLE_URL, json={"message": "hi", "on_disconnect": on_disconnect})
        await trio.sleep(60)
        assert provider.seen[-1] == (ended_at, "cancelled")
        assert world.journal.entries[-1][0::2] == ("ended", ended_at)


async def test_a_stopped_whole_answer_is_what_was_said(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(100)))

        async def stop_after(seconds: float) -> None:
            await trio.sleep(seconds)
            await world.client.post(run_url(world.journal.entries[0][1], "/stop"))

        world.nursery.start_soon(stop_after, 2.5)
        response = await world.client.post(WHOLE_URL, json={"message": "hi"})
        data = response.json()["data"]
        assert (data["content"], data["finish_reason"]) == ("word0 word1 ", "stopped")
        assert trio.current_time() == 2.5


# The old way


async def test_the_simulated_stream_says_nothing_but_heartbeats_until_the_end(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(92)))
        parts = await timed_parts(world, SIMULATED_URL)
        assert [(at, part) for at, part in parts[:-1]] == [(at, HEARTBEAT) for at in (15, 30, 45, 60, 75, 90)]
        assert parts[-1][0] == 92


@pytest.mark.parametrize("said", ["", "short", "exactly 10", "héllo wörld 🧵🧶 日本語のテキスト e\u0301"])
async def test_the_simulated_stream_cuts_the_same_text_into_ten_characters(
    said: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((1, text(*said)), (2, (UsagePiece(7, 2),))))
        streamed = await world.chat()
        (_, body), *rest = await timed_parts(world, SIMULATED_URL)
        events = events_in(body)
        assert rest == []
        assert [event.content for event in events if isinstance(event, TextDelta)] == [
            said[start : start + 10] for start in range(0, len(said), 10)
        ]
        assert text_of(events) == text_of(streamed.events) == said
        assert [type(event) for event in events if not isinstance(event, TextDelta)] == [
            type(event) for event in streamed.events if not isinstance(event, TextDelta)
        ]
        assert events[-1] == streamed.events[-1]


async def test_a_simulated_run_that_fails_says_so(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        failure = ProviderError("upstream.server", "the model broke off")
        world.add_agent(provider=ScriptedProvider((1, text("so far")), (2, failure)))
        (_, body), *_ = await timed_parts(world, SIMULATED_URL)
        last = events_in(body)[-1]
        assert isinstance(last, Error)
        assert (last.code, last.response) == ("upstream.server", "so far")


# Runs


async def test_a_runs_state_while_it_goes_on_and_after(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO))
        run_id = await start_in_background(world)

        async def state() -> Any:
            response = await world.client.get(run_url(run_id))
            assert response.status_code == 200
            assert response.headers["Cache-Control"] == "no-store"
            return response.json()["data"]

        fresh = {"run_id": run_id, "agent_id": "demo", "status": "running", "ttfb_ms": None, "memory_updates": 0} | {
            "usage": {"input_tokens": 8, "output_tokens": 0, "estimated": True}
        }
        assert await state() == fresh | {"last_seq": 1, "response": "", "elapsed_ms": 0.0, "terminal": None}
        await trio.sleep(1.5)
        spoken = await state()
        assert (spoken["status"], spoken["response"], spoken["ttfb_ms"]) == ("running", "Hel", 1000.0)
        assert spoken["usage"]["estimated"] is True
        await trio.sleep(10)
        ended = await state()
        assert (ended["status"], ended["response"], ended["elapsed_ms"]) == ("done", "Hello", 3000.0)
        assert ended["usage"] == {"input_tokens": 7, "output_tokens": 2}
        assert ended["terminal"]["chunk_type"] == "done"


async def test_a_stop_ends_the_run_for_its_reader_at_once_and_keeps_what_was_said(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        provider = ScriptedProvider(*words(100))
        world.add_agent(provider=provider)
        states: list[Any] = []

        async def stop_twice(run_id: str) -> None:
            await trio.sleep(2.5)
            for _ in range(2):
                response = await world.client.post(run_url(run_id, "/stop"))
                assert response.status_code == 200
                states.append(response.json()["data"])

        async with world.open_chat() as answer:
            world.nursery.start_soon(stop_twice, answer.run_id)
            events = [event async for event in answer]
        assert isinstance(events[-1], AgentStopped)
        assert (events[-1].reason, events[-1].response) == ("requested", "word0 word1 ")
        assert answer.arrivals[-1] == 2.5
        assert provider.seen[-1] == (2.5, "cancelled")
        await trio.sleep(1)
        assert states[0] == states[1]
        assert states[0]["status"] == "stop"
        assert states[0]["terminal"] == msgspec.to_builtins(events[-1])


async def test_a_stop_after_the_end_changes_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO))
        answer = await world.chat()
        before = (await world.client.get(run_url(answer.run_id))).json()
        response = await world.client.post(run_url(answer.run_id, "/stop"))
        assert response.status_code == 200
        assert response.json() == before
        assert before["data"]["status"] == "done"


async def test_a_stop_needs_no_body_and_minds_none(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((FOREVER, ())))
        for content in (b"", b"{}", b"not JSON"):
            run_id = await start_in_background(world)
            response = await world.client.post(run_url(run_id, "/stop"), content=content)
            assert response.json()["data"]["status"] == "stop"


async def test_a_deleted_run_is_stopped_and_gone(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        provider = ScriptedProvider(*words(100))
        world.add_agent(provider=provider)

        async def delete_after(seconds: float, run_id: str) -> None:
            await trio.sleep(seconds)
            response = await world.client.delete(run_url(run_id))
            assert (response.status_code, response.content) == (204, b"")

        async with world.open_chat() as answer:
            world.nursery.start_soon(delete_after, 2.5, answer.run_id)
            events = [event async for event in answer]
        assert isinstance(events[-1], AgentStopped)
        assert provider.seen[-1] == (2.5, "cancelled")
        assert (await world.client.get(run_url(answer.run_id))).status_code == 404
        assert (await world.client.delete(run_url(answer.run_id))).status_code == 404


@pytest.mark.parametrize(
    ("method", "rest"), [("GET", ""), ("GET", "/events"), ("HEAD", "/events"), ("POST", "/stop"), ("DELETE", "")]
)
@pytest.mark.parametrize("run_id", ["A" * 22, "x", "..", "%00", "%FF", "x" * 5000], ids=lambda run_id: run_id[:4])
async def test_an_unknown_run_is_404(method: str, rest: str, run_id: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        response = await world.client.request(method, run_url(run_id, rest))
        assert response.status_code == 404
        if method != "HEAD":
            assert response.json()["code"] == "NOT_FOUND"


async def test_an_ended_run_is_forgotten_after_ten_minutes(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO))
        answer = await world.chat()
        await trio.sleep(599)
        assert (await world.client.get(run_url(answer.run_id))).status_code == 200
        await trio.sleep(1)
        assert (await world.client.get(run_url(answer.run_id))).status_code == 404


# Health and draining


async def test_health_is_live_and_ready(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((FOREVER, ())))
        async with world.open_chat():
            live = await world.client.get(f"{BASE}/health/live")
            ready = await world.client.get(f"{BASE}/health/ready")
        assert (live.status_code, live.json()) == (200, {"status": "ok"})
        running = {"status": "ok", "active_runs": 1, "queued_runs": 0, "saturated": False, "shared_log": None}
        assert (ready.status_code, ready.json()) == (200, running)


@pytest.mark.parametrize("url", [STREAM_URL, WHOLE_URL, SIMULATED_URL])
async def test_a_draining_server_refuses_new_runs(url: str, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*HELLO))
        await world.supervisor.drain(30)
        response = await world.client.post(url, json={"message": "hi"})
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "5"
        assert response.json()["code"] == "SERVICE_UNAVAILABLE"
        assert world.journal.entries == []


async def test_a_draining_server_is_live_but_not_ready_and_streams_go_on(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(20)))
        async with world.open_chat() as answer:
            world.nursery.start_soon(world.supervisor.drain, 30)
            await trio.sleep(5)
            ready = await world.client.get(f"{BASE}/health/ready")
            assert ready.status_code == 503
            assert ready.headers["Retry-After"] == "5"
            assert (await world.client.get(f"{BASE}/health/live")).status_code == 200
            assert (await world.client.get(run_url(answer.run_id))).status_code == 200
            events = [event async for event in answer]
        assert isinstance(events[-1], GenerationComplete)


async def test_what_outlasts_the_drain_ends_with_draining_and_its_text(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider(*words(100)))
        async with world.open_chat() as answer:
            world.nursery.start_soon(world.supervisor.drain, 10.5)
            events = [event async for event in answer]
        assert isinstance(events[-1], Error)
        assert (events[-1].code, events[-1].response) == ("draining", "".join(f"word{n} " for n in range(10)))
        assert answer.arrivals[-1] == 10.5
        assert all(later >= earlier for earlier, later in pairwise(answer.arrivals))
