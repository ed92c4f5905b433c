"""Simulated model servers: raw HTTP/1.1 over the in-memory network, each answer as planned, good or bad."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import trio

from providers.network import Connect
from server.testing.memory_connection import MemoryConnection, MemoryStream
from server.testing.vendor_bytes import read_request as receive_request

from .observations import UpstreamCall
from .plan import AnswerPlan, VendorPlan
from .replies import read_request, reply_text, reply_usage
from .vendor_bytes import Script, make_script

__all__ = ["Noter", "Vendor", "guarded", "reply_text", "reply_usage", "worker_of"]

_KEY = re.compile(rb"\r\n(?:authorization: bearer|x-api-key:|x-goog-api-key:|api-key:) *([^\r]*)", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+)$")


class Noter(Protocol):
    """What keeps the story of a world."""

    def note(self, actor: str, what: str, **facts: Any) -> None:
        """Put down what an actor did, now."""
        ...


class _CallerGoneError(Exception):
    """The caller closed its end in the middle of its answer."""


def worker_of(host: str) -> int:
    """The worker that connects from this host: the number that its name ends in, else 0."""
    number = _NUMBER.search(host)
    return int(number[1]) if number else 0


class Vendor:
    """A model server. Its n-th request gets the n-th answer of the plan, all further ones the last.

    Each request goes into ``calls``. Where the next answer is ``refuse`` or ``black_hole``, there is no connection:
    whoever connects for the callers awaits ``admit`` before (``guarded`` does). A request on a connection that is
    open already is not answered then: the connection closes, and the caller's next one is not admitted.
    """

    def __init__(self, plan: VendorPlan, number: int, calls: list[UpstreamCall], trace: Noter) -> None:
        self.plan = plan
        self.number = number
        self._calls = calls
        self._trace = trace
        self._actor = f"vendor {number}"
        self._answered = 0

    @property
    def next_answer(self) -> AnswerPlan:
        """What the next request will get."""
        return self.plan.answers[min(self._answered, len(self.plan.answers) - 1)]

    def start(self, nursery: trio.Nursery, listener: trio.abc.Listener[Any]) -> None:
        """Serve in the nursery until it is cancelled; the listener takes connections from now on."""
        nursery.start_soon(trio.serve_listeners, self._serve, [listener])

    async def admit(self) -> None:
        """Let a caller connect.

        Raises:
            ConnectionRefusedError: the next answer is ``refuse``. For ``black_hole`` this never returns.
        """
        fault = self.next_answer.fault
        if fault in ("refuse", "black_hole"):
            self._answered += 1
            self._trace.note(self._actor, fault)
        if fault == "refuse":
            raise ConnectionRefusedError(f"{self._actor} refuses")
        if fault == "black_hole":
            await trio.sleep_forever()

    async def _serve(self, stream: MemoryStream) -> None:
        last: UpstreamCall | None = None
        try:
            # A caller that has gone is no fault here, and a connection that we broke is as planned.
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, _CallerGoneError):
                while request := await receive_request(stream):
                    if self.next_answer.fault in ("refuse", "black_hole"):
                        break
                    plan, last = self._take(request, stream)
                    await self._answer(stream, plan, request, last)
        finally:
            if last is not None and last.answered_at is None:
                last.closed_at = stream.connection.client.closed_at
            stream.close()

    def _take(self, request: bytes, stream: MemoryStream) -> tuple[AnswerPlan, UpstreamCall]:
        plan, number = self.next_answer, self._answered
        self._answered += 1
        worker = worker_of(stream.connection.client.socket.local[0])
        call = UpstreamCall(self.number, number, worker, trio.current_time(), request=request)
        self._calls.append(call)
        self._trace.note(self._actor, "request", number=number, worker=worker, fault=plan.fault)
        return plan, call

    async def _answer(self, stream: MemoryStream, plan: AnswerPlan, request: bytes, call: UpstreamCall) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        key = _KEY.search(head)
        asked = read_request(self.plan.wire, body)
        answer_id = f"sim{self.number}x{call.number}"
        script = make_script(self.plan.wire, plan, asked, answer_id, key[1].decode() if key else "")
        try:
            await self._play(stream, script, call)
        finally:
            over = call.answered_at is not None
            call.closed_at = call.answered_at if over else stream.connection.client.closed_at
            what = "answered" if over else "broke off"
            self._trace.note(self._actor, what, number=call.number, pieces=len(call.content_times))

    async def _play(self, stream: MemoryStream, script: Script, call: UpstreamCall) -> None:
        sent = 0
        for at, data in script.sends:
            due = call.opened_at + at
            if due > trio.current_time():
                await _watch(stream.connection, due)
            await stream.send_all(data)
            sent += len(data)
            whole = bisect_right(script.content_ends, sent) - len(call.content_times)
            call.content_times += [trio.current_time()] * whole
            if script.answer_bytes is not None and sent >= script.answer_bytes and call.answered_at is None:
                call.answered_at = trio.current_time()
        match script.end:
            case "keep":
                call.answered_at = trio.current_time() if call.answered_at is None else call.answered_at
                return
            case "close":
                stream.close()
            case "reset":
                stream.connection.cut(reset=True)
        await _wait_caller_closed(stream.connection)


def guarded(connect: Connect, vendors: Mapping[str, Vendor]) -> Connect:
    """The same way to connect, but that vendors (by host) may refuse; hosts that are no vendor's pass."""

    async def admitted(host: str, port: int, tls: bool) -> trio.abc.Stream:
        if host in vendors:
            await vendors[host].admit()
        return await connect(host, port, tls)

    return admitted


async def _watch(connection: MemoryConnection, until: float) -> None:
    """Wait, but no longer than the caller can hear what comes then."""
    with trio.CancelScope(deadline=until):
        while not connection.to_client.reader_gone:
            await connection.to_client.changed.park()
        raise _CallerGoneError


async def _wait_caller_closed(connection: MemoryConnection) -> None:
    """Until the caller's end is closed by its owner."""
    while connection.client.closed_at is None:
        await connection.to_client.changed.park()
