"""``kill -9`` of a real server in the middle of a stream: what the next one serves of the run, and how it ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from engine import Error, Event, GenerationComplete, TextDelta
from engine.events import TERMINAL_EVENT_TYPES
from providers.sse import SSEParser
from server.store.run_events import RESERVED_SEQ
from tests.harness.recordings import steady_recording
from tests.server.test_compose import LONG, STEADY, Site, site

BODY = {"message": "the prompt"}
HEADERS = {"Idempotency-Key": "once"}
SHORT = steady_recording(first=0.05, gap=0.05, last=0.3)

_decode = msgspec.json.Decoder(Event).decode


class Seen:
    """What a client has received of a run: whole frames only."""

    def __init__(self) -> None:
        self.run_id = ""
        self.content = b""
        self.seqs: list[int] = []
        self.events: list[Event] = []
        self._parser = SSEParser()

    def feed(self, received: bytes) -> None:
        self.content += received
        for frame in self._parser.feed(received):
            self.seqs.append(int(frame.id.rpartition(".")[2]))
            self.events.append(_decode(frame.data))

    @property
    def text(self) -> str:
        return "".join(event.content for event in self.events if isinstance(event, TextDelta))

    @property
    def frames(self) -> list[bytes]:
        """The whole ones, without comments."""
        return [frame for frame in self.content.split(b"\n\n")[:-1] if not frame.startswith(b":")]


async def stream_until_killed(lumos: Site, events: int) -> Seen:
    """Read a chat until so many events have come, and kill the server; then read what still comes."""
    seen = Seen()
    url = f"{lumos.url}/api/v1/agents/local/chat/lumosai/stream"
    async with lumos.client.stream("POST", url, json=BODY, headers=HEADERS) as response:
        seen.run_id = response.headers["X-Run-Id"]
        with trio.fail_after(LONG):  # noqa: ASYNC912 - the body may break off at once
            try:
                while received := await response.extensions["body"].receive():
                    seen.feed(received)
                    if len(seen.seqs) >= events:
                        lumos.serve.process.kill()
            except httpx.TransportError:
                pass
        await lumos.serve.wait_exit()
    return seen


async def read_run(lumos: Site, run_id: str, after: int | None = None) -> Seen:
    """Read the run to the end of the body."""
    seen = Seen()
    headers = {} if after is None else {"Last-Event-ID": f"{run_id}.{after}"}
    with trio.fail_after(LONG):
        response = await lumos.client.get(f"{lumos.url}/api/v1/runs/{run_id}/events", headers=headers)
    assert response.status_code == 200, response.text
    seen.feed(response.content)
    return seen


async def data(lumos: Site, path: str) -> Any:
    response = await lumos.client.get(f"{lumos.url}/api/v1{path}")
    assert response.status_code == 200, response.text
    return response.json()["data"]


@asynccontextmanager
async def restarted(directory: Path) -> AsyncIterator[Site]:
    """A server on the same database."""
    async with site(directory) as lumos:
        yield lumos


@pytest.mark.parametrize("events", [1, 2, 5, 12, 30])
async def test_a_run_that_was_killed_is_served_as_far_as_it_was_kept_and_ends_once(events: int, tmp_path: Path) -> None:
    async with site(tmp_path, recording=STEADY) as lumos:
        seen = await stream_until_killed(lumos, events)
    assert seen.seqs == list(range(1, len(seen.seqs) + 1))
    assert not isinstance(seen.events[-1], TERMINAL_EVENT_TYPES)

    async with restarted(tmp_path) as lumos:
        assert "runs.interrupted" in lumos.serve.output
        whole = await read_run(lumos, seen.run_id)
        *kept, last = whole.seqs
        assert kept == list(range(1, len(kept) + 1)), "what was journalled, without a gap"
        assert last == RESERVED_SEQ + 1
        assert [isinstance(event, TERMINAL_EVENT_TYPES) for event in whole.events] == [False] * len(kept) + [True]
        for ours, theirs in zip(seen.frames, whole.frames[:-1], strict=False):
            assert ours == theirs, "to the byte"
        terminal = whole.events[-1]
        assert isinstance(terminal, Error)
        assert terminal.code == "interrupted"
        assert terminal.response == whole.text
        assert STEADY.text.startswith(terminal.response)
        if events == 30:  # they took more than a second
            assert len(kept) > 10
        rest = await read_run(lumos, seen.run_id, after=seen.seqs[-1])
        assert rest.seqs == [seq for seq in whole.seqs if seq > seen.seqs[-1]]
        assert STEADY.text.startswith(seen.text + rest.text)
        await assert_kept(lumos, seen.run_id, terminal)
        again = f"{lumos.url}/api/v1/agents/local/chat/lumosai/stream"
        joined = await lumos.client.post(again, json=BODY, headers=HEADERS)
        assert joined.content == whole.content, "the repeated request joins, and starts nothing"
        lumos.serve.process.kill()

    async with restarted(tmp_path) as lumos:
        assert "runs.interrupted" not in lumos.serve.output
        assert (await read_run(lumos, seen.run_id)).content == whole.content
        url = f"{lumos.url}/api/v1/runs/{seen.run_id}/events?after={last}"
        assert (await lumos.client.get(url)).status_code == 204
        assert (await lumos.client.get(f"{url}0")).status_code == 400
        await assert_kept(lumos, seen.run_id, terminal)


async def assert_kept(lumos: Site, run_id: str, terminal: Error) -> None:
    """The state, and the user's message once."""
    state = await data(lumos, f"/runs/{run_id}")
    assert (state["status"], state["response"]) == ("error", terminal.response)
    history = (await data(lumos, "/agents/local/chat/history"))["items"]
    said = [(message["role"], message["content"]) for message in history]
    answer = [("assistant", terminal.response)] if terminal.response else []
    assert said == [("user", BODY["message"]), *answer]


async def test_a_server_that_dies_right_after_an_answer_tells_its_end(tmp_path: Path) -> None:
    async with site(tmp_path, recording=SHORT) as lumos:
        seen = Seen()
        url = f"{lumos.url}/api/v1/agents/local/chat/lumosai/stream"
        async with lumos.client.stream("POST", url, json=BODY) as response:
            seen.run_id = response.headers["X-Run-Id"]
            while not (seen.events and isinstance(seen.events[-1], TERMINAL_EVENT_TYPES)):
                seen.feed(await response.extensions["body"].receive())
            lumos.serve.process.kill()
            await lumos.serve.wait_exit()
    async with restarted(tmp_path) as lumos:
        whole = await read_run(lumos, seen.run_id)
        terminal = whole.events[-1]
        assert isinstance(terminal, GenerationComplete)
        assert terminal.response == SHORT.text
        assert (await data(lumos, f"/runs/{seen.run_id}"))["status"] == "done"


async def test_what_a_server_that_ends_has_served_is_served_by_the_next_to_the_byte(tmp_path: Path) -> None:
    async with site(tmp_path, "--drain", "0", recording=STEADY) as lumos:
        seen = Seen()
        url = f"{lumos.url}/api/v1/agents/local/chat/lumosai/stream"
        async with lumos.client.stream("POST", url, json=BODY) as response:
            seen.run_id = response.headers["X-Run-Id"]
            with trio.fail_after(LONG):
                while len(seen.seqs) <= 5:
                    seen.feed(await response.extensions["body"].receive())
                lumos.serve.process.terminate()
                while received := await response.extensions["body"].receive():
                    seen.feed(received)
        assert await lumos.serve.wait_exit() == 0
    assert isinstance(seen.events[-1], Error)
    assert seen.events[-1].code == "draining"
    async with restarted(tmp_path) as lumos:
        assert (await read_run(lumos, seen.run_id)).content == seen.content
