"""Simulated clients on a WebSocket: one run per agent, read side by side, and read on after a cut."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from math import inf
from typing import Any

import msgspec
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Ping, RejectConnection, RejectData, Request, TextMessage
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from engine.events import RETRY_MILLISECONDS
from server.testing.memory_connection import MemoryStream

from .asking import Asker
from .observations import Ending, Response, SeenFrame
from .plan import StepPlan
from .reading_clients import MAX_TRIES, RETRY_SECONDS

HANDSHAKE_SECONDS = 60.0

STOP_ID = "stop"
"""What a stop is called, so that its refusal is not taken for a run's that cannot be read on, which has no name."""


class Heard(msgspec.Struct):
    """A message of the server's; ``event`` is its JSON as it came."""

    type: str
    run_id: str = ""
    request_id: str = ""
    seq: int = 0
    event: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(Heard).decode


def frame_of(heard: Heard) -> bytes:
    """The event as HTTP's readers get it: the same bytes but for the way they came."""
    retry = b"retry: %d\n" % RETRY_MILLISECONDS if heard.seq == 1 else b""
    return b"%sid: %s.%d\ndata: %s\n\n" % (retry, heard.run_id.encode(), heard.seq, bytes(heard.event))


class SocketClient:
    """A client on one socket at a time. Each subscription to a run is a ``Response`` of its own, ``what="socket"``.

    Attributes:
        seen: how many events came altogether.
    """

    def __init__(self, asker: Asker, nursery: trio.Nursery) -> None:
        self.seen = 0
        self._asker = asker
        self._plan = asker.plan
        self._nursery = nursery
        self._worker = asker.plan.worker % asker.world.plan.workers
        self._stream: MemoryStream | None = None
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._text: list[str] = []
        self._asked: dict[str, Response] = {}
        self._reading: dict[str, Response] = {}
        self._last: dict[str, int] = {}
        self._over: set[str] = set()
        self._started = 0
        self._left = self._half_closed = False

    async def act(self) -> None:
        """Start the runs, take the steps, and hear all to the end."""
        try:
            if await self._open(self._worker):
                for agent in self._plan.agents:
                    await self._start(agent)
            for step in self._plan.steps:
                await self._wait_due(step)
                self._asker.note("step", act=step.act, seen=self.seen)
                await self._take(step)
            await self._finish()
        finally:
            self._close("left" if self._plan.read_pause else "")

    async def _open(self, worker: int) -> bool:
        """Whether there is a socket to that worker now."""
        self._close("left")
        self._worker, self._left, self._half_closed = worker, False, False
        self._ws, self._text = WSConnection(ConnectionType.CLIENT), []
        self._stream = await self._asker.connect(worker, self._plan.window)
        if self._stream is None:
            return False
        more = [
            (name.encode(), value.encode()) for name, value in self._asker.world.key_header(self._plan.user).items()
        ]
        request = Request(host="localhost", target="/api/v1/ws", subprotocols=["lumos.v1"], extra_headers=more)
        await self._send(self._ws.send(request))
        with trio.move_on_after(HANDSHAKE_SECONDS):
            return await self._shake_hands(worker)
        self._close("left")
        return False

    async def _shake_hands(self, worker: int) -> bool:
        refusal: Response | None = None
        while await self._receive():
            for event in self._ws.events():
                match event:
                    case AcceptConnection():
                        self._asker.note("opened a socket", worker=worker)
                        return True
                    case RejectConnection(status_code=status, headers=headers):
                        refusal = self._asker.response("socket", worker)
                        refusal.status = status
                        refusal.headers = {bytes(n).decode().lower(): bytes(v).decode() for n, v in headers}
                    case RejectData(data=data) if refusal is not None:
                        refusal.body += data
        if refusal is not None:
            refusal.ending, refusal.ended_at = "whole", trio.current_time()
        self._close("broken")
        return False

    async def _start(self, agent: int) -> None:
        plan = self._plan
        request_id = str(self._started)
        self._started += 1
        self._asked[request_id] = self._asker.response("socket", self._worker)
        await self._say(
            "start",
            request_id=request_id,
            agent_id=self._asker.world.agent_id(agent),
            message=plan.message,
            session_id=f"session-{plan.session}",
            on_disconnect=plan.on_disconnect,
        )

    async def _subscribe(self, run_id: str, after: int) -> None:
        self._reading[run_id] = self._asker.response("socket", self._worker, run_id, after)
        await self._say("subscribe", run_id=run_id, after=after)

    async def _say(self, kind: str, **fields: Any) -> None:
        with suppress(LocalProtocolError):  # the socket is closing
            await self._send(self._ws.send(TextMessage(data=msgspec.json.encode({"type": kind} | fields).decode())))

    async def _send(self, data: bytes) -> None:
        if self._stream is not None and not self._half_closed:
            with suppress(trio.BrokenResourceError):
                await self._stream.send_all(data)

    async def _receive(self) -> bool:
        """Whether something came that is not the end."""
        assert self._stream is not None
        try:
            data = await self._stream.receive_some(self._plan.read_bytes)
        except trio.BrokenResourceError:
            data = b""
        # A head that breaks off in the middle is no bad HTTP: its sender died.
        with nullcontext() if data else suppress(RemoteProtocolError):
            self._ws.receive_data(data or None)
        return bool(data)

    async def _hear(self) -> None:
        """Read once."""
        came = await self._receive()
        replies = []
        for event in self._ws.events():
            match event:
                case TextMessage(data=data, message_finished=finished):
                    self._text.append(data)
                    if finished:
                        self._take_in("".join(self._text))
                        self._text.clear()
                case Ping() as ping:
                    replies.append(self._ws.send(ping.response()))
                case CloseConnection():
                    came = False
        for reply in replies:
            await self._send(reply)
        if not came:
            self._close("left" if self._half_closed else "broken")
        elif self._plan.read_pause:
            await trio.sleep(self._plan.read_pause)

    def _take_in(self, text: str) -> None:
        heard = _decode(text)
        response = self._asked.get(heard.request_id) or self._reading.get(heard.run_id)
        match heard.type:
            case "started" if response is not None:
                del self._asked[heard.request_id]
                self._reading[heard.run_id] = response
                response.run_id, response.status = heard.run_id, 200
                self._last.setdefault(heard.run_id, 0)
            case "subscribed" if response is not None:
                response.status = 200
            case "event" if response is not None:
                self.seen += 1
                self._last[heard.run_id] = heard.seq
                frame = SeenFrame(trio.current_time(), f"{heard.run_id}.{heard.seq}", frame_of(heard))
                response.frames.append(frame)
            case "end" if response is not None:
                self._over.add(heard.run_id)
                self._end(response, "whole")
            case "stopped":
                self._asker.world.observations.stops.setdefault(heard.run_id, trio.current_time())
            case "error" if response is not None and response.status and not heard.request_id:
                self._end(response, "broken")  # no more can be read now; it may be subscribed again
            case "error" if response is not None and not response.status and heard.request_id != STOP_ID:
                response.status, response.body = 400, text.encode()
                self._over |= {heard.run_id} if heard.run_id else set()
                self._end(response, "whole")

    def _end(self, response: Response, ending: Ending) -> None:
        if not response.ending:
            response.ending, response.ended_at = ending, trio.current_time()
            self._asker.note("heard", request="socket", run=response.run_id, ending=ending, frames=len(response.frames))
        self._asked = {name: asked for name, asked in self._asked.items() if asked is not response}
        self._reading = {name: reading for name, reading in self._reading.items() if reading is not response}

    def _close(self, ending: Ending, *, reset: bool = False) -> None:
        """Close the socket; what was being read on it ends so."""
        stream, self._stream = self._stream, None
        if stream is not None:
            if reset:
                stream.reset()
            stream.close()
        for response in [*self._asked.values(), *self._reading.values()]:
            self._end(response, ending)

    @property
    def _waits(self) -> bool:
        """Whether anything is still to come on the socket."""
        return self._stream is not None and bool(self._asked or self._reading)

    async def _wait_due(self, step: StepPlan) -> None:
        due, wanted = trio.current_time() + step.after, self.seen + step.events
        await self._hear_until(due, wanted)
        if self.seen < wanted:
            await trio.sleep_until(due)

    async def _hear_until(self, due: float, wanted: float) -> None:
        with trio.CancelScope(deadline=due):  # noqa: ASYNC912 - there may be nothing to hear
            while self._waits and self.seen < wanted:
                await self._hear()

    async def _take(self, step: StepPlan) -> None:
        run_id = next(iter(self._reading), next(iter(self._last), ""))
        elsewhere = self._asker.next_worker(self._worker)
        path = f"/api/v1/runs/{run_id}"
        match step.act:
            case "leave" | "reset":
                await self._leave(reset=step.act == "reset")
            case "half_close":
                await self._half_close()
            case "pause":
                await trio.sleep(step.seconds)
            case "post_again":
                if self._stream is not None:
                    await self._start(self._plan.agents[0])
            case _ if not run_id:
                self._asker.note("has no run yet")
            case "stop":
                await self._say("stop", run_id=run_id, request_id=STOP_ID)
            case "stop_elsewhere":
                answer = await self._asker.ask_whole("stop", elsewhere, ("POST", f"{path}/stop"), run_id=run_id)
                if answer.status == 200 and answer.ending == "whole":
                    self._asker.world.observations.stops.setdefault(run_id, answer.ended_at)
            case "resume" | "resume_elsewhere":
                await self._come_back(elsewhere if step.act == "resume_elsewhere" else self._worker)
            case "resume_from":
                self._last[run_id] = max(0, step.number)
                await self._come_back(self._worker)
            case "resume_forged":
                await self._say("subscribe", run_id="A" * 22, after=max(0, step.number))
            case "second_reader":
                self._nursery.start_soon(self._read_beside, path, run_id)
            case "state":
                await self._asker.ask_whole("state", self._worker, ("GET", path), run_id=run_id)
            case "delete":
                await self._asker.ask_whole("delete", self._worker, ("DELETE", path), run_id=run_id)

    async def _leave(self, *, reset: bool) -> None:
        if not reset and self._stream is not None:
            with suppress(LocalProtocolError):
                await self._send(self._ws.send(CloseConnection(code=1000)))
        self._close("left", reset=reset)
        self._left = True

    async def _half_close(self) -> None:
        if self._stream is not None and not self._half_closed:
            self._half_closed = True
            with suppress(trio.BrokenResourceError):
                await self._stream.send_eof()

    async def _read_beside(self, path: str, run_id: str) -> None:
        exchange = await self._asker.ask("events", self._worker, ("GET", f"{path}/events"), run_id=run_id)
        await exchange.read_to_end()

    async def _come_back(self, worker: int) -> None:
        """Open another socket, and read on there."""
        if await self._open(worker):
            for run_id, last in self._last.items():
                if run_id not in self._over:
                    await self._subscribe(run_id, last)

    async def _finish(self) -> None:
        """Hear all to the end; what was cut is read on elsewhere, but not for ever."""
        await self._hear_until(inf, inf)
        for _ in range(MAX_TRIES):
            if self._left or self._half_closed or not self._last.keys() - self._over:
                return
            await trio.sleep(RETRY_SECONDS)
            await self._come_back(self._asker.next_worker(self._worker))
            await self._hear_until(inf, inf)
