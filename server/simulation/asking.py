"""How simulated clients ask a world's workers, and keep what they are answered."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import trio

from server.testing.memory_connection import MemoryStream
from server.testing.memory_network import MemoryNetwork

from .http_client import Exchange, request_bytes
from .observations import Observations, Response
from .plan import ClientPlan, Plan
from .vendors import Noter

ANSWER_SECONDS = 60.0
"""What a client waits for an answer that is no stream, before it leaves."""


class ClientWorld(Protocol):
    """What clients need of their world."""

    network: MemoryNetwork
    observations: Observations
    plan: Plan

    @property
    def trace(self) -> Noter:
        """Where its story goes."""
        ...

    def address(self, worker: int) -> tuple[str, int]:
        """Where the worker listens."""
        ...

    def key_header(self, user: int) -> dict[str, str]:
        """What the user's requests show."""
        ...

    def agent_id(self, number: int) -> str:
        """What the agent is called in URLs."""
        ...


class Asker:
    """A client's way to the workers. Every answer goes into the world's observations, and none stays open behind it.

    Attributes:
        actor: the client's name in the trace.
    """

    def __init__(self, world: ClientWorld, number: int, plan: ClientPlan) -> None:
        self.world = world
        self.number = number
        self.plan = plan
        self.actor = f"client{number}"
        self._exchanges: list[Exchange] = []

    def note(self, what: str, **facts: Any) -> None:
        """Put down what the client did."""
        self.world.trace.note(self.actor, what, **facts)

    def next_worker(self, worker: int) -> int:
        """Another worker, if there is one."""
        return (worker + 1) % self.world.plan.workers

    def response(self, what: str, worker: int, run_id: str = "", after: int = 0) -> Response:
        """A new answer, which is asked for now."""
        response = Response(self.number, what, worker, trio.current_time(), after=after, run_id=run_id)
        self.world.observations.responses.append(response)
        return response

    async def connect(self, worker: int, window: int | None = None) -> MemoryStream | None:
        """A connection to the worker, the caller's to close; None if nobody is there."""
        host, port = self.world.address(worker)
        try:
            stream = await self.world.network.connect(host, port, client_host=self.actor)
        except OSError:
            return None
        if window is not None:
            stream.connection.to_client.window = window
        return stream

    async def ask(
        self,
        what: str,
        worker: int,
        request: tuple[str, str],
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        run_id: str = "",
        after: int = 0,
        paced: bool = False,
    ) -> Exchange:
        """Ask on a new connection: the exchange, whose answer has ended already if nobody is there.

        ``request`` is method and path; a ``paced`` answer is read at the client's own pace.
        """
        plan = self.plan
        response = self.response(what, worker, run_id, after)
        self.note("asks", method=request[0], path=request[1], worker=worker)
        stream = await self.connect(worker, plan.window if paced else None)
        exchange = Exchange(stream, response, plan.read_bytes, plan.read_pause) if paced else Exchange(stream, response)
        self._exchanges.append(exchange)
        if stream is not None:
            fields = self.world.key_header(plan.user) | dict(headers or {})
            with suppress(trio.BrokenResourceError):  # a server that hangs up early may have answered
                await stream.send_all(request_bytes(*request, fields, body))
        return exchange

    async def ask_whole(
        self, what: str, worker: int, request: tuple[str, str], headers: Mapping[str, str] | None = None, **of: Any
    ) -> Response:
        """Ask, and read the answer to its end, or leave after ``ANSWER_SECONDS``."""
        exchange = await self.ask(what, worker, request, headers=headers, **of)
        with trio.move_on_after(ANSWER_SECONDS):
            await exchange.read_to_end()
        exchange.leave()
        response = exchange.response
        self.note("answered", request=what, status=response.status, ending=response.ending)
        return response

    def close(self) -> None:
        """Close what is open. A slow reader leaves; for any other one, that its answer never ended is left to see."""
        for exchange in self._exchanges:
            if exchange.open:
                self.note("gives up", request=exchange.response.what)
                exchange.give_up(leaves=bool(self.plan.read_pause))
