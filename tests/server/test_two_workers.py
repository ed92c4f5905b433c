"""The proof of runs that survive: clients that drop and resume anywhere over two workers that are killed meanwhile.

``LUMOS_RESUMES`` says how often they drop; CI takes some, the full proof is 1,000.
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import pytest
import trio

from engine import Error, Event, GenerationComplete
from engine.events import TERMINAL_EVENT_TYPES
from engine.pieces import TextPiece
from providers.http import open_client
from providers.recording import Recording
from providers.sse import SSEParser
from server.leases import LOST_SEQ
from tests.harness.recordings import steady_recording
from tests.harness.redis import RedisServer
from tests.server.shared_scene import eventually
from tests.server.workers_scene import LONG, Workers, open_workers

RESUMES = int(os.environ.get("LUMOS_RESUMES", "120"))
RUNS_AT_ONCE = 8
KILL_EVERY_SECONDS = 1.5
RECORDING = steady_recording(first=0.05, gap=0.02, last=1.2)

decode_event = msgspec.json.Decoder(Event).decode


def whole_text(recording: Recording) -> str:
    """What a run that is not cut says."""
    pieces = (piece for read in recording.reads for piece in read.pieces)
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


@dataclass
class Reader:
    """A client of one run that drops its connection at random moments and comes back with what it had last."""

    url: str
    client: httpx.AsyncClient
    chance: random.Random
    run_id: str = ""
    ids: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    drops: int = 0
    refusals: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether it has the terminal event."""
        return bool(self.events) and isinstance(self.events[-1], TERMINAL_EVENT_TYPES)

    @property
    def text(self) -> str:
        """The answer's text as it came."""
        return "".join(getattr(event, "content", "") for event in self.events if not isinstance(event, Error))

    async def read_all(self) -> None:
        """Start a run, and read it to its end however often that takes."""
        while not self.run_id:
            await self._read("POST", f"{self.url}/api/v1/agents/local/chat/lumosai/stream", json={"message": "?"})
        with trio.fail_after(LONG):  # noqa: ASYNC912 - it has not ended
            while not self.ended:
                last = {"Last-Event-ID": f"{self.run_id}.{self.ids[-1]}"} if self.ids else {}
                await self._read("GET", f"{self.url}/api/v1/runs/{self.run_id}/events", headers=last)

    async def _read(self, method: str, url: str, **options: object) -> None:
        parser = SSEParser()
        try:
            with trio.move_on_after(self.chance.uniform(0, 0.4)) as drop:  # noqa: ASYNC912 - a request waits
                async with self.client.stream(method, url, **options) as response:  # type: ignore[arg-type]
                    if response.status_code != 200:
                        self.refusals.append(response.status_code)
                        await trio.sleep(0.05)
                        return
                    self.run_id = self.run_id or response.headers["X-Run-Id"]
                    while chunk := await response.extensions["body"].receive():
                        for frame in parser.feed(chunk):
                            run_id, _, seq = frame.id.rpartition(".")
                            assert run_id == self.run_id
                            self.ids.append(int(seq))
                            self.events.append(decode_event(frame.data))
            self.drops += drop.cancelled_caught
        except httpx.TransportError:
            self.drops += 1

    def check(self, whole: str) -> None:
        """No gap, no repeat, one end; all of the text, or of a run that another worker ended the beginning.

        That has the end of its row in the store: of a worker killed just after it kept the whole answer, ``done``.
        """
        ends = [event for event in self.events if isinstance(event, TERMINAL_EVENT_TYPES)]
        assert ends == self.events[-1:]
        assert self.ids[:-1] == list(range(1, len(self.ids)))
        assert self.ids[-1] in (len(self.ids), LOST_SEQ)
        is_lost = self.ids[-1] == LOST_SEQ
        assert whole.startswith(self.text) if is_lost else self.text == whole
        if isinstance(ends[0], GenerationComplete):
            assert ends[0].response == whole
        else:
            assert isinstance(ends[0], Error)
            assert ends[0].code == "worker_lost"
            assert is_lost


async def _kill_workers(workers: Workers, chance: random.Random) -> None:
    """Now and then, when both are there, kill one."""
    starts = 2
    while True:
        await trio.sleep(KILL_EVERY_SECONDS)
        await workers.wait_serving(starts)
        os.kill(chance.choice(list(workers.living().values())), signal.SIGKILL)
        starts += 1


@pytest.mark.timeout(60 + RESUMES)
async def test_clients_that_drop_and_resume_over_two_workers_that_are_killed(
    redis_server: RedisServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(5)
    readers: list[Reader] = []
    async with open_workers(tmp_path, redis_server.url, RECORDING, "--lease", "1") as workers, open_client() as client:

        async def read_runs() -> None:
            while sum(reader.drops for reader in readers) < RESUMES:
                reader = Reader(workers.url, client, random.Random(chance.random()))
                readers.append(reader)
                await reader.read_all()

        async with trio.open_nursery() as killing:
            killing.start_soon(_kill_workers, workers, chance)
            async with trio.open_nursery() as reading:
                for _ in range(RUNS_AT_ONCE):
                    reading.start_soon(read_runs)
            killing.cancel_scope.cancel()
        for reader in readers:
            reader.check(whole_text(RECORDING))
        ends = [type(reader.events[-1]).__name__ for reader in readers]
        with capsys.disabled():
            print(  # noqa: T201 - the figures of the proof
                f"\n{len(readers)} runs, {sum(reader.drops for reader in readers)} drops, "
                f"{len(workers.of('worker.crashed'))} workers killed: "
                f"{ends.count('GenerationComplete')} done, {ends.count('Error')} lost; "
                f"refusals on the way: {sorted({status for reader in readers for status in reader.refusals})}"
            )


async def _wait_shared(client: httpx.AsyncClient, url: str) -> None:
    """Until Redis has the run's first text: no worker could end a run that died before that."""
    seen = 0
    while seen < 4:  # either worker, likely: the kernel deals the connections
        response = await client.get(url, headers={"Connection": "close"})
        seen = seen + 1 if response.status_code == 200 and response.json()["data"]["response"] else 0


async def _start(client: httpx.AsyncClient, workers: Workers) -> tuple[str, str]:
    """A run, as a POST starts it: its id, and the name of its worker."""
    url = f"{workers.url}/api/v1/agents/local/chat/lumosai/stream"
    body = {"message": "?", "on_disconnect": "continue"}
    async with client.stream("POST", url, json=body) as response:
        run_id = response.headers["X-Run-Id"]
        await response.extensions["body"].receive()
    await eventually(lambda: run_id in workers.output)
    await _wait_shared(client, f"{workers.url}/api/v1/runs/{run_id}")
    return run_id, next(line["worker"] for line in workers.of("run.started") if line["run_id"] == run_id)


async def _statuses(client: httpx.AsyncClient, url: str, kinds: int) -> set[int]:
    """What the workers answer, once there are so many kinds of answers: the kernel deals the connections."""
    seen: set[int] = set()
    with trio.fail_after(LONG):  # noqa: ASYNC912 - there are some kinds to be seen
        while len(seen) < kinds:
            seen.add((await client.get(url, headers={"Connection": "close"})).status_code)
    return seen


async def test_a_worker_that_stood_still_comes_back_to_runs_that_are_lost(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    recording = steady_recording(first=0.05, gap=0.05, last=30.0)
    async with open_workers(tmp_path, redis_server.url, recording, "--lease", "1") as workers, open_client() as client:
        run_id, name = await _start(client, workers)
        pid = workers.living()[name]
        url = f"{workers.url}/api/v1/runs/{run_id}/events"
        assert await _statuses(client, f"{workers.url}/api/v1/runs/{run_id}/trace", 2) == {200, 503}
        os.kill(pid, signal.SIGSTOP)
        (lost,) = await workers.wait_lines("run.worker_lost")
        assert lost["run_id"] == run_id
        assert lost["worker"] != name
        os.kill(pid, signal.SIGCONT)
        (back,) = await workers.wait_lines("worker.was_given_up")
        assert back["worker"] != lost["worker"]
        ended = (await workers.wait_lines("run.ended"))[0]
        assert (ended["run_id"], ended["reason"]) == (run_id, "error:worker_lost")
        for _ in range(8):  # either worker
            with trio.fail_after(LONG):
                text = (await client.get(url, headers={"Connection": "close"})).text
            assert text.count('"chunk_type":"error","code":"worker_lost"') == 1
            assert text.count('"chunk_type":"done"') == 0
        again, _ = await _start(client, workers)
        stopped = await client.post(f"{workers.url}/api/v1/runs/{again}/stop")
        assert stopped.status_code == 200


async def test_while_redis_is_away_workers_serve_what_they_have(redis_server: RedisServer, tmp_path: Path) -> None:
    recording = steady_recording(first=0.05, gap=0.05, last=30.0)
    async with open_workers(tmp_path, redis_server.url, recording, "--lease", "1") as workers, open_client() as client:
        runs: dict[str, str] = {}
        while len(set(runs.values())) < 2:  # the kernel deals
            runs |= [await _start(client, workers)]
        redis_server.kill()
        await workers.wait_lines("redis.away", 4)
        seen: set[tuple[bool, int]] = set()
        for run_id in runs:
            while len(seen) < 2:
                response = await client.get(f"{workers.url}/api/v1/runs/{run_id}", headers={"Connection": "close"})
                seen.add((response.status_code == 200, response.status_code))
        assert seen == {(True, 200), (False, 503)}
        ready = await client.get(f"{workers.url}/health/ready")
        assert (ready.status_code, ready.json()["shared_log"]) == (200, "away")
        redis_server.start()
        await workers.wait_lines("redis.connected", 8)
        for run_id in runs:
            for _ in range(6):
                response = await client.get(f"{workers.url}/api/v1/runs/{run_id}", headers={"Connection": "close"})
                assert (response.status_code, response.json()["data"]["status"]) == (200, "running")
        assert workers.of("run.worker_lost") == []
