"""One WebSocket's session: runs are started, read and stopped on it, many at once.

Each subscription is a task that reads its run's log, as any reader does. They write by turns: who has something waits
for the turn, takes what is there by then, writes up to ``TURN_BYTES`` of it, and goes to the end of the queue. Nothing
is kept but what is being written: what a slow socket has not read is in the logs.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any, Protocol, cast

import trio
from quart import Request

from engine import LogEntry

from .api_chat import start_run
from .errors import ApiError, not_found
from .journal_log import EventsDroppedError
from .principal import Principal
from .routing import PATH_IDS, Call
from .run_access import find_run, find_run_or_state, unavailable
from .run_directory import ElsewhereError, GoneError, RunHandle
from .services import Services
from .socket_messages import (
    End,
    Ping,
    Pong,
    ServerMessage,
    Start,
    Started,
    Stop,
    Stopped,
    Subscribe,
    Subscribed,
    Unsubscribe,
    Unsubscribed,
    encode,
    encode_event,
    parse,
    refused,
    refused_run,
    refused_start,
)
from .store.errors import StoreUnavailableError

MAX_SUBSCRIPTIONS = 100
"""Of one socket, with the starts that are under way."""

TURN_BYTES = 64 * 1024
"""About what one run may write before the others have their turn."""

MESSAGES_PER_SECOND = 100
BURST_MESSAGES = 200
"""What a client may say; one that says more is talking nonsense, and is cut off."""

BYTES_OF_A_MESSAGE = 16 * 1024
"""So much of a long message counts as one more."""

CLOSE_SECONDS = 1.0
LAST_WORDS_SECONDS = 1.5
"""What is left of a draining server's time for the ends of runs to be written, and for the goodbye."""

POLICY_VIOLATION = 1008
SERVICE_RESTART = 1012


class Socket(Protocol):
    """What a session needs of Quart's WebSocket."""

    async def receive(self) -> Any:
        """The next message: text, bytes, or None for an empty binary one."""
        ...

    async def send(self, data: str) -> None:
        """Send a text message; waits while the client does not read, at most as long as serving allows."""
        ...

    async def close(self, code: int, reason: str = "") -> None:
        """Say goodbye."""
        ...


class Allowance:
    """So many a second, with a burst of some at once."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = self._left = burst
        self._counted_at = trio.current_time()

    def take(self, count: float = 1.0) -> bool:
        """Take so many; False if there are not so many left."""
        now = trio.current_time()
        self._left = min(self._burst, self._left + (now - self._counted_at) * self._per_second) - count
        self._counted_at = now
        return self._left >= 0


class Subscription:
    """A run that is being read, and the number of its last event that was written."""

    def __init__(self, run: RunHandle, after: int) -> None:
        self.run = run
        self.after = after
        self.left = False
        self._waiting = trio.CancelScope()

    def leave(self) -> None:
        """Write nothing from now on. What is being written is finished: half a frame would end the socket."""
        self.left = True
        self._waiting.cancel(reason="unsubscribed")

    async def wait_turn(self, turn: trio.Lock) -> list[LogEntry] | None:
        """Wait until there is something to write, then for the turn, the caller's to release. None: it has left.

        Raises:
            ApiError: the events are not to be had, or not now.
        """
        if self.left:
            return None
        with trio.CancelScope() as self._waiting:  # noqa: ASYNC912 - the log may have something already
            entries = await self._read()
            await turn.acquire()
            return entries
        return None

    async def more(self) -> list[LogEntry]:
        """What is there by now of a run under way. Raises as ``wait_turn``."""
        return [] if self.run.log.ended else await self._read(trio.current_time())

    async def _read(self, deadline: float = inf) -> list[LogEntry]:
        try:
            return await self.run.log.read(self.after, deadline)
        except EventsDroppedError as error:
            raise ApiError(410, "GONE", "the run's events are no longer kept; its state is") from error
        except (trio.BrokenResourceError, trio.TooSlowError, StoreUnavailableError) as error:
            raise unavailable("the run's events cannot be had now: subscribe again") from error


class SocketSession:
    """What one client does on one socket. ``run`` is all its life."""

    def __init__(self, socket: Socket, services: Services, caller: Principal) -> None:
        self._socket = socket
        self._services = services
        self._caller = caller
        self._subscriptions: dict[str, Subscription] = {}
        self._starting = 0
        self._turn = trio.Lock()  # first come, first served
        self._ended_one = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        """Do as the client says until this side closes. A client that goes away cancels this."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_after, self._wait_drained, SERVICE_RESTART, "the server ends", nursery)
            if self._services.gatekeeper is not None:
                wait_revoked = partial(self._services.gatekeeper.wait_revoked, self._caller)
                nursery.start_soon(self._end_after, wait_revoked, POLICY_VIOLATION, "the key is revoked", nursery)
            obey = partial(self._obey, nursery)
            await self._end_after(obey, POLICY_VIOLATION, "too many messages", nursery)

    async def _end_after(
        self, wait: Callable[[], Awaitable[None]], code: int, reason: str, nursery: trio.Nursery
    ) -> None:
        """Close the socket once that wait is over."""
        await wait()
        for subscription in self._subscriptions.values():
            subscription.leave()
        with trio.move_on_after(CLOSE_SECONDS):
            async with self._turn:
                await self._socket.close(code, reason)
        nursery.cancel_scope.cancel(reason=reason)

    async def _wait_drained(self) -> None:
        """Until the server has ended its runs, and their ends are written or have had their time."""
        await self._services.supervisor.wait_drained()
        with trio.move_on_after(LAST_WORDS_SECONDS):  # noqa: ASYNC912 - there may be none
            while self._subscriptions or self._starting:
                await self._ended_one.park()

    async def _obey(self, nursery: trio.Nursery) -> None:
        """Do as the client says, as long as it does not say too much."""
        allowance = Allowance(MESSAGES_PER_SECOND, BURST_MESSAGES)
        while True:
            message = await self._socket.receive()
            if not allowance.take(1 + len(message or b"") // BYTES_OF_A_MESSAGE):
                return
            try:
                said = parse(message)
            except ApiError as error:
                await self._say(refused(error, message))
                continue
            if isinstance(said, Start):  # may wait for a place, and then is the one who reads
                self._starting += 1
                nursery.start_soon(self._start, said)
            else:
                await self._do(said, nursery)

    async def _do(self, said: Subscribe | Unsubscribe | Stop | Ping, nursery: trio.Nursery) -> None:
        try:
            match said:
                case Subscribe():
                    subscription = await self._find(said)
                    await nursery.start(self._follow, subscription, Subscribed(run_id=said.run_id, after=said.after))
                case Unsubscribe(run_id=run_id):
                    if run_id in self._subscriptions:
                        self._subscriptions[run_id].leave()
                        del self._subscriptions[run_id]
                    await self._say(Unsubscribed(run_id=run_id))
                case Stop(run_id=run_id):
                    await self._say(await self._stop(run_id))
                case Ping(data=data):
                    await self._say(Pong(data=data))
        except ApiError as error:
            await self._say(refused_run(error, said))

    async def _start(self, said: Start) -> None:
        """Start the run, then read it."""
        try:
            try:
                run = await self._start_run(said)
            finally:
                self._starting -= 1
                self._ended_one.unpark_all()
        except ApiError as error:
            await self._say(refused_start(error, said))
            return
        started = Started(request_id=said.request_id, run_id=run.run_id, session_id=run.owner.session_id)
        await self._follow(self._add(run, 0), started)

    async def _start_run(self, said: Start) -> RunHandle:
        services = self._services
        if services.supervisor.draining:
            raise ApiError(503, "draining", "the server is shutting down: connect again")
        self._check_room(self._starting - 1)
        if services.gatekeeper is not None:
            services.gatekeeper.limiter.count_request(self._caller)
        if not re.fullmatch(PATH_IDS["agent_id"].pattern, said.agent_id, re.ASCII):
            raise not_found("agent", said.agent_id)
        call: Call[Any, None] = self._call({"agent_id": said.agent_id}, said)
        return services.runs.local(await start_run(call))

    async def _find(self, said: Subscribe) -> Subscription:
        """A new subscription.

        Raises:
            ApiError: as ``find_run``; 400 for a number that the run does not have yet; 409 for a second one of one run.
        """
        if said.run_id in self._subscriptions:
            raise ApiError(409, "CONFLICT", "the run is subscribed on this socket already")
        self._check_room(self._starting)
        run = await find_run(self._call({}), said.run_id)
        if said.after > run.log.last_seq:
            raise ApiError(400, "INVALID_CURSOR", f"the run is at {run.log.last_seq}, not at {said.after}")
        return self._add(run, said.after)

    async def _stop(self, run_id: str) -> Stopped:
        try:
            run = await find_run_or_state(self._call({}), run_id)
        except GoneError as gone:
            return Stopped(run_id=run_id, status=gone.view.status)
        except ElsewhereError as elsewhere:
            raise unavailable("another server has the run") from elsewhere
        await run.stop()
        return Stopped(run_id=run_id, status=run.view().status)

    def _check_room(self, starting: int) -> None:
        if len(self._subscriptions) + starting >= MAX_SUBSCRIPTIONS:
            raise ApiError(429, "TOO_MANY_SUBSCRIPTIONS", f"a socket reads at most {MAX_SUBSCRIPTIONS} runs at once")

    def _add(self, run: RunHandle, after: int) -> Subscription:
        subscription = self._subscriptions[run.run_id] = Subscription(run, after)
        return subscription

    async def _follow(  # noqa: ASYNC114 - it is no context manager
        self,
        subscription: Subscription,
        greeting: ServerMessage,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Write the run's events by turns until all are written, or the client has unsubscribed."""
        with subscription.run.log.attached():
            await self._say(greeting)
            task_status.started()
            try:
                await self._write_all(subscription)
            except ApiError as error:
                run_id = subscription.run.run_id
                if self._subscriptions.get(run_id) is subscription:
                    del self._subscriptions[run_id]
                    self._ended_one.unpark_all()
                    await self._say(refused_run(error, Subscribe(run_id=run_id)))

    async def _write_all(self, subscription: Subscription) -> None:
        over = False
        while not over:
            entries = await subscription.wait_turn(self._turn)
            if entries is None:
                return
            try:
                over = await self._write(subscription, entries)
            finally:
                self._turn.release()

    async def _write(self, subscription: Subscription, entries: list[LogEntry]) -> bool:
        """Write what fits into one turn; whether that was the last of the run."""
        run, size = subscription.run, 0
        for entry in await subscription.more() or entries:  # more, if the turn was long in coming
            if size >= TURN_BYTES:
                return False
            await self._socket.send(encode_event(run.run_id, entry))
            subscription.after = entry.seq
            size += len(entry.frame)
        if subscription.left or not run.log.ended or subscription.after < run.log.last_seq:
            return False
        del self._subscriptions[run.run_id]
        await self._socket.send(encode(End(run_id=run.run_id)))
        self._ended_one.unpark_all()
        return True

    async def _say(self, message: ServerMessage) -> None:
        async with self._turn:
            await self._socket.send(encode(message))

    def _call(self, ids: dict[str, str], body: Any = None) -> Call[Any, None]:
        """What routes get: the socket's handshake stands for the request."""
        return Call(self._services, self._caller, ids, body, None, cast(Request, self._socket))
