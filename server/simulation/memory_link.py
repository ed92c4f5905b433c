"""Links to a Redis in memory: a worker's side of the shared log, with the pauses and the errors of a real link."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Any

import trio

from server.redis_link import Command, Link, RedisAwayError

from .memory_redis import MemoryRedis
from .memory_streams import ReplyError, parse_xread


class MemoryLink(Link):
    """A link that can die with its worker."""

    def __init__(self, redis: MemoryRedis, role: str) -> None:
        """``role`` names it in the log."""
        super().__init__(role, self._open)
        self._redis = redis
        self._newest: MemoryConnection | None = None
        self._killed = False

    def _open(self) -> MemoryConnection:
        self._newest = MemoryConnection(self._redis)
        if self._killed:
            self._newest.freeze()
        return self._newest

    def kill(self) -> None:
        """As by ``kill -9`` of its worker: nothing that is asked from now on has any effect, or any answer."""
        self._killed = True
        if self._newest is not None:
            self._newest.freeze()


class WorkerLinks:
    """Opens the links of one worker's ``SharedLog``, and cuts them all when the worker dies."""

    def __init__(self, redis: MemoryRedis) -> None:
        self._redis = redis
        self._links: list[MemoryLink] = []

    def __call__(self, _url: str, role: str) -> MemoryLink:
        """A new link."""
        link = MemoryLink(self._redis, role)
        self._links.append(link)
        return link

    def kill(self) -> None:
        """The worker is dead: nothing of it reaches Redis any more."""
        for link in self._links:
            link.kill()


class _Request:
    def __init__(self, commands: Sequence[Command], arrives_at: float) -> None:
        self.commands = [[_bytes(word) for word in command] for command in commands]
        self.arrives_at = arrives_at
        self.answers: list[Any] = []
        self.settled = trio.Event()


class MemoryConnection:
    """A ``RedisConnection``: what is asked is done in the order of asking, by the task that runs the connection."""

    def __init__(self, redis: MemoryRedis) -> None:
        self._redis = redis
        self._requests: deque[_Request] = deque()
        self._asked = trio.Event()
        self._unsettled: dict[_Request, None] = {}
        self._lost = trio.Event()
        self._reason = ""
        self._frozen = False

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC114 - ``Link`` starts it
        """Connect, say so, and keep the connection. Raises RedisAwayError."""
        await trio.lowlevel.checkpoint()
        await self._redis.wait_going()
        if self._frozen:
            await trio.sleep_forever()
        if not self._redis.connect(self):
            raise RedisAwayError("the connection was refused")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve)
                task_status.started()
                await self._lost.wait()
                nursery.cancel_scope.cancel(reason=self._reason)
        finally:
            self.invalidate("the connection was closed")

    async def ask_all(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Redis's answer to each. Raises RedisAwayError."""
        self._check_there()
        if not commands:
            return []  # noqa: ASYNC910 - as with a real one
        request = _Request(commands, trio.current_time() + self._redis.latency)
        self._requests.append(request)
        self._asked.set()
        self._unsettled[request] = None
        try:
            with trio.move_on_after(seconds) as limit:
                await request.settled.wait()
                if self._redis.latency:
                    with trio.move_on_after(self._redis.latency):
                        await self._lost.wait()
        finally:
            del self._unsettled[request]
        if limit.cancelled_caught:
            self.invalidate("Redis does not answer")
        self._check_there()
        for answer in request.answers:
            if isinstance(answer, ReplyError):
                raise RedisAwayError(str(answer)) from answer
        return request.answers

    def invalidate(self, reason: str) -> None:
        """It is lost: what was asked has no answer, and is not done if it is not done yet."""
        if not self._lost.is_set():
            self._reason = reason
            self._lost.set()
            self._redis.disconnect(self)
        for request in self._unsettled:
            request.settled.set()

    def freeze(self) -> None:
        """Nothing goes over it any more, either way, and neither side is told."""
        self._frozen = True
        self._redis.disconnect(self)

    def close(self) -> None:
        """There is nothing to let go of."""

    def _check_there(self) -> None:
        if self._lost.is_set():
            raise RedisAwayError(self._reason)

    @property
    def _open(self) -> bool:
        return not (self._frozen or self._lost.is_set())

    async def _serve(self) -> None:
        while True:  # noqa: ASYNC913 - waits for requests
            while not self._requests:
                self._asked = trio.Event()
                await self._asked.wait()
            request = self._requests.popleft()
            if request.arrives_at > trio.current_time():
                await trio.sleep_until(request.arrives_at)
            for command in request.commands:
                answer = await self._answer(command)
                if not self._open:
                    return
                if self._redis.loses_answer():
                    self.invalidate("the connection was lost before the answer")
                    return
                request.answers.append(answer)
            request.settled.set()

    async def _answer(self, command: list[bytes]) -> Any:
        """What Redis says; ReplyError too."""
        block = _Block(command)
        while True:
            await self._redis.wait_going()
            if not self._open:
                return None
            try:
                answer = self._redis.do(command)
            except ReplyError as error:
                return error
            if answer is not None or trio.current_time() >= block.until:
                return answer
            with trio.move_on_at(block.until):
                await self._redis.wait_added(block.keys)


class _Block:
    """How long a command waits for an entry, and in which streams; most do not wait."""

    def __init__(self, command: list[bytes]) -> None:
        self.until = -inf
        self.keys: Sequence[bytes] = ()
        if command[0].upper() != b"XREAD":
            return
        try:
            reading = parse_xread(command[1:])
        except ReplyError:
            return  # Redis says so
        if reading.block is not None:
            self.until = trio.current_time() + reading.block / 1000 if reading.block else inf
            self.keys = reading.keys


def _bytes(word: str | bytes | int) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()
