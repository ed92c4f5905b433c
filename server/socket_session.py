"""One WebSocket's session: runs are started, read and stopped on it, many at once.

Each subscription is a task that reads its run's log, as any reader does. They write by turns: who has something waits
for the turn, takes what is there by then, writes up to ``TURN_BYTES`` of it, and goes to the end of the queue. What one
read of a log brings is one write, cut where it is large. Nothing is kept but what is being written: what a slow socket
has not read is in the logs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, cast

import trio
from msgspec import structs

from engine import LogEntry

from .asked import Asked
from .errors import ApiError, not_found
from .principal import Principal
from .routing import PATH_IDS, Call
from .run_access import find_run, find_run_or_state, unavailable
from .run_directory import ElsewhereError, GoneError, RunHandle
from .services import Services
from .socket_messages import (
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
    broken_off,
    encode,
    parse,
    refused,
    refused_run,
    refused_start,
)
from .socket_reading import Subscription
from .socket_starts import check_cursor, run_of_start
from .store.rows import RunStatus

MAX_SUBSCRIPTIONS = 100
"""Of one socket, with the starts that are under way."""

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

    async def send(self, data: list[str]) -> None:
        """Send text messages in one write; waits while the client does not read, at most as long as serving allows."""
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
        name = said.request_id
        try:
            match said:
                case Subscribe(run_id=run_id, after=after):
                    subscription = await self._find(said)
                    answer = Subscribed(request_id=name, run_id=run_id, after=after)
                    await nursery.start(self._follow, subscription, answer)
                case Unsubscribe(run_id=run_id):
                    if run_id in self._subscriptions:
                        self._subscriptions[run_id].leave()
                        del self._subscriptions[run_id]
                    await self._say(Unsubscribed(request_id=name, run_id=run_id))
                case Stop(run_id=run_id):
                    await self._say(Stopped(request_id=name, run_id=run_id, status=await self._stop(run_id)))
                case Ping(data=data):
                    await self._say(Pong(request_id=name, data=data))
        except ApiError as error:
            await self._say(refused_run(error, said))

    async def _start(self, said: Start) -> None:
        """Start the run, or join it, then read it."""
        try:
            try:
                run = await self._run_of(said)
            finally:
                self._starting -= 1
                self._ended_one.unpark_all()
            check_cursor(run, said.after)
        except ApiError as error:
            await self._say(refused_start(error, said))
            return
        started = Started(
            request_id=said.request_id, run_id=run.run_id, session_id=run.owner.session_id, after=said.after
        )
        while (subscription := self._subscriptions.get(run.run_id)) is not None:  # joined, and read here already
            async with self._turn:
                if self._subscriptions.get(run.run_id) is subscription:  # still: what it writes next follows
                    await self._socket.send([encode(structs.replace(started, after=subscription.after))])
                    return
        await self._follow(self._add(run, said.after), started)

    async def _run_of(self, said: Start) -> RunHandle:
        self._check_room(self._starting - 1)
        if self._services.gatekeeper is not None:
            self._services.gatekeeper.limiter.count_request(self._caller)
        if not PATH_IDS["agent_id"].fits(said.agent_id):
            raise not_found("agent", said.agent_id)
        call: Call[Any, None] = self._call({"agent_id": said.agent_id}, said.chat)
        return await run_of_start(call, said.idempotency_key, said.after)

    async def _find(self, said: Subscribe) -> Subscription:
        """A new subscription.

        Raises:
            ApiError: as ``find_run``; 400 for a number that the run does not have yet; 409 for a second one of one run.
        """
        if said.run_id in self._subscriptions:
            raise ApiError(409, "CONFLICT", "the run is subscribed on this socket already")
        self._check_room(self._starting)
        run = await find_run(self._call({}), said.run_id)
        check_cursor(run, said.after)
        return self._add(run, said.after)

    async def _stop(self, run_id: str) -> RunStatus:
        """Stop the run; how it ended."""
        try:
            run = await find_run_or_state(self._call({}), run_id)
        except GoneError as gone:
            return gone.view.status
        except ElsewhereError as elsewhere:
            raise unavailable("another server has the run") from elsewhere
        await run.stop()
        return run.view().status

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
                    await self._say(broken_off(error, run_id))

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
        entries = await subscription.more() or entries  # more, if the turn was long in coming
        for messages in subscription.pieces(entries):
            if subscription.left:
                return False
            if subscription.over:  # a client that has heard the end may subscribe again
                del self._subscriptions[subscription.run.run_id]
            await self._socket.send(messages)
        if subscription.over:
            self._ended_one.unpark_all()
        return subscription.over

    async def _say(self, message: ServerMessage) -> None:
        async with self._turn:
            await self._socket.send([encode(message)])

    def _call(self, ids: dict[str, str], body: Any = None) -> Call[Any, None]:
        """What routes get: the socket's handshake stands for the request."""
        return Call(self._services, self._caller, ids, body, None, cast(Asked, self._socket))
