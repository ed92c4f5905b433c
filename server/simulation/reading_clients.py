"""Simulated clients that read over HTTP: one stream, one whole answer, or a batch, with whatever they do meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

import msgspec
import trio

from .asking import Asker
from .http_client import Exchange
from .plan import StepPlan

RETRY_SECONDS = 1.0
"""What an ``EventSource`` waits before it comes back; our first frame asks for that."""

MAX_TRIES = 12
MAX_RETRY_AFTER = 10.0

ENDS = re.compile(rb'"chunk_type":"(done|error|stop|batch_done)"')
_CODES_TO_WAIT_FOR = {"SERVICE_UNAVAILABLE", "RATE_LIMITED", "CONFLICT"}


def forged_id(run_id: str, number: int) -> str:
    """A ``Last-Event-ID`` that no server gave: of the future, of another run, or nonsense."""
    forgeries = (f"{run_id}.999999", f"{'A' * 22}.1", "garbage", f"{run_id}.-1", f"{run_id}.1e3", "." * 5000, run_id)
    return forgeries[number % len(forgeries)]


class ReadingClient:
    """A client that asks once and reads to the end, through cuts, stops and resumes.

    Attributes:
        run_id: of its run or its batch; empty until it is told.
        last: the number of the last frame that it has.
        seen: how many frames came altogether.
    """

    def __init__(self, asker: Asker, nursery: trio.Nursery) -> None:
        self.run_id = ""
        self.last = self.seen = 0
        self._asker = asker
        self._plan = asker.plan
        self._nursery = nursery
        self._worker = asker.plan.worker % asker.world.plan.workers
        self._exchange: Exchange | None = None
        self._taken = 0
        self._ended = False
        self._run_ids: list[str] = []

    async def act(self) -> None:
        """Ask, take the steps, and read to the end."""
        await self._begin(self._worker)
        for step in self._plan.steps:
            await self._wait_due(step)
            self._asker.note("step", act=step.act, seen=self.seen)
            await self._take(step)
        await self._finish()

    async def _begin(self, worker: int, *, cursor: bool = False) -> None:
        """Ask for what the plan says; with the cursor of what it has."""
        what, path, body = self._first_request()
        headers = {"Idempotency-Key": f"key-of-{self._asker.actor}"} if self._plan.idempotent else {}
        after = self.last if cursor else 0
        if cursor and self.last:
            headers["Last-Event-ID"] = f"{self.run_id}.{self.last}"
        run_id = self.run_id = self.run_id if cursor and self.last else ""  # without an event of it, it begins anew
        exchange = await self._asker.ask(
            what, worker, ("POST", path), body, headers, run_id=run_id, after=after, paced=True
        )
        self._hold(exchange, worker)

    def _first_request(self) -> tuple[str, str, bytes]:
        """What it is, where it goes, and its body."""
        plan = self._plan
        agents = [self._asker.world.agent_id(number) for number in plan.agents]
        chat = {"message": plan.message, "session_id": f"session-{plan.session}"}
        if plan.manner == "batch":
            requests = [{**chat, "agent_id": agent} for agent in agents]
            body: dict[str, Any] = {"requests": requests, "on_disconnect": plan.on_disconnect}
            return "batch", "/api/v1/batch/stream", msgspec.json.encode(body)
        path = f"/api/v1/agents/{agents[0]}/chat/lumosai"
        body = {**chat, "on_disconnect": plan.on_disconnect}
        if plan.manner == "whole":
            return "whole", path, msgspec.json.encode(body)
        return "chat", f"{path}/stream", msgspec.json.encode(body)

    @property
    def _path(self) -> str:
        return f"/api/v1/{'batch' if self._plan.manner == 'batch' else 'runs'}/{self.run_id}"

    @property
    def _events(self) -> str:
        return "batch_events" if self._plan.manner == "batch" else "events"

    def _hold(self, exchange: Exchange, worker: int) -> None:
        self._leave()
        self._exchange, self._worker, self._taken = exchange, worker, 0

    def _leave(self, *, reset: bool = False) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.leave(reset=reset)

    async def _resume(self, worker: int, after: int, *, by_number: bool = False) -> None:
        """Read on after a number; closes what is open."""
        self._leave()
        headers = {"Last-Event-ID": f"{self.run_id}.{after}"} if after and not by_number else {}
        path = f"{self._path}/events" + (f"?after={after}" if by_number else "")
        exchange = await self._asker.ask(
            self._events, worker, ("GET", path), headers=headers, run_id=self.run_id, after=after, paced=True
        )
        self._hold(exchange, worker)

    async def _read(self, until: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Read until then, or until that is so, or until the answer ends."""
        exchange = self._exchange
        with trio.CancelScope(deadline=until):  # noqa: ASYNC912 - there may be nothing to read
            while exchange is not None and exchange.open and not enough():
                await exchange.read()
                self._look(exchange)

    def _look(self, exchange: Exchange) -> None:
        """Take in what is new."""
        response = exchange.response
        self.run_id = self.run_id or response.run_id
        for frame in response.frames[self._taken :]:
            self._taken += 1
            self.seen += 1
            number = frame.id.rpartition(".")[2]
            self.last = int(number) if number.isdecimal() else self.last
            end = ENDS.search(frame.frame)
            if self._plan.manner != "batch":
                self._ended = self._ended or end is not None
            elif end is not None:
                self._ended = self._ended or end[1] == b"batch_done"
            elif b'"batch_start"' in frame.frame:
                data = msgspec.json.decode(frame.frame.partition(b"data: ")[2])
                self._run_ids = [run["run_id"] for run in data["runs"]]
                self._asker.world.observations.batches[self.run_id] = self._run_ids
        if response.ending:
            self._asker.note(
                "heard", request=response.what, status=response.status, ending=response.ending, last=self.last
            )

    async def _wait_due(self, step: StepPlan) -> None:
        """Until so many more events came, or so much time went by; meanwhile it reads."""
        due, wanted = trio.current_time() + step.after, self.seen + step.events
        await self._read(due, lambda: self.seen >= wanted)
        if self.seen < wanted:
            await trio.sleep_until(due)

    async def _take(self, step: StepPlan) -> None:
        elsewhere = self._asker.next_worker(self._worker)
        match step.act:
            case "leave" | "reset":
                self._leave(reset=step.act == "reset")
            case "half_close":
                if self._exchange is not None:
                    await self._exchange.half_close()
            case "pause":
                await trio.sleep(step.seconds)
            case "post_again":
                self._nursery.start_soon(self._post_again)
            case _ if not self.run_id:
                self._asker.note("has no run yet")
            case "stop" | "stop_elsewhere":
                await self._stop(elsewhere if step.act == "stop_elsewhere" else self._worker)
            case "resume" if step.number % 2 and self._plan.manner != "whole":
                await self._begin(self._worker, cursor=True)
            case "resume" | "resume_elsewhere":
                await self._resume(elsewhere if step.act == "resume_elsewhere" else self._worker, self.last)
            case "resume_from":
                await self._resume(self._worker, max(0, step.number), by_number=True)
            case "resume_forged":
                headers = {"Last-Event-ID": forged_id(self.run_id, step.number)}
                await self._asker.ask_whole(self._events, self._worker, ("GET", f"{self._path}/events"), headers)
            case "second_reader":
                self._nursery.start_soon(self._read_beside, self._events, f"{self._path}/events", self.run_id)
            case "state":
                await self._asker.ask_whole("state", self._worker, ("GET", self._path), run_id=self.run_id)
            case "delete":
                await self._delete()

    async def _post_again(self) -> None:
        what, path, body = self._first_request()
        headers = {"Idempotency-Key": f"key-of-{self._asker.actor}"} if self._plan.idempotent else {}
        exchange = await self._asker.ask(what, self._worker, ("POST", path), body, headers)
        await exchange.read_to_end()

    async def _read_beside(self, what: str, path: str, run_id: str) -> None:
        exchange = await self._asker.ask(what, self._worker, ("GET", path), run_id=run_id)
        await exchange.read_to_end()

    async def _stop(self, worker: int) -> None:
        answer = await self._asker.ask_whole("stop", worker, ("POST", f"{self._path}/stop"), run_id=self.run_id)
        if answer.status != 200 or answer.ending != "whole":
            return
        data = msgspec.json.decode(answer.body)["data"]
        for run in data.get("runs", [data]):
            self._asker.world.observations.stops.setdefault(run["run_id"], answer.ended_at)

    async def _delete(self) -> None:
        """Forget the run; of a batch the first one."""
        of_batch = self._run_ids[:1] if self._plan.manner == "batch" else [self.run_id]
        for run_id in of_batch:
            await self._asker.ask_whole("delete", self._worker, ("DELETE", f"/api/v1/runs/{run_id}"), run_id=run_id)

    async def _finish(self) -> None:
        """Read to the end; a client whose answer was cut, or that is to come later, comes back, but not for ever."""
        await self._read(inf)
        for _ in range(MAX_TRIES):
            if self._exchange is None or self._exchange.response.ending == "left":
                return
            seconds = self._seconds_to_retry(self._exchange)
            if seconds is None:
                break
            await trio.sleep(seconds)
            await self._ask_again(self._exchange)
            await self._read(inf)
        if self._plan.manner == "batch" and not self._ended:
            await self._read_runs()

    def _seconds_to_retry(self, exchange: Exchange) -> float | None:
        """When to ask again; None if there is no more to come, or no safe way to ask."""
        response = exchange.response
        if self._ended:
            return None
        if response.ending == "broken":
            safe = exchange.stream is None or self._plan.idempotent or self._may_resume
            return RETRY_SECONDS if safe else None
        with suppress(ValueError, KeyError, msgspec.DecodeError):
            if msgspec.json.decode(response.body)["code"] in _CODES_TO_WAIT_FOR:
                return min(float(response.headers["retry-after"]), MAX_RETRY_AFTER)
        return None

    @property
    def _may_resume(self) -> bool:
        return bool(self.run_id) and self._plan.manner != "whole"

    async def _ask_again(self, exchange: Exchange) -> None:
        broken = exchange.response.ending == "broken"
        worker = self._asker.next_worker(self._worker) if broken else self._worker
        if self._may_resume:
            await self._resume(worker, self.last)
        else:
            await self._begin(worker)

    async def _read_runs(self) -> None:
        """A batch goes with its worker; each of its runs is still to be had by itself."""
        for run_id in self._run_ids:
            await self._read_beside("events", f"/api/v1/runs/{run_id}/events", run_id)
