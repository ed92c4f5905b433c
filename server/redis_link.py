"""A connection to Redis or Valkey that comes back by itself; everybody's commands share it, in the order they are sent.

There is no pool. coredis 6.9's loses a slot when a task is cancelled while it connects, and a wake-up when one is
cancelled while it waits; here a task of the link's own connects, and a cancelled caller leaves an answer that nobody
wants, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import structlog
import trio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from coredis.connection import BaseConnection
from coredis.exceptions import RedisError
from coredis.pool import ConnectionPool

CONNECT_SECONDS = 5.0
REPLY_SECONDS = 5.0
"""What Redis may take for an answer; then the connection counts as lost (a host that is gone says nothing)."""

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
"""Between two attempts to connect: well under a lease, so that a worker is back before anybody judges it."""

Command: TypeAlias = Sequence[str | bytes | int]

_logger = structlog.get_logger("lumos")


class RedisAwayError(Exception):
    """Redis cannot be reached, or does not do what it is asked (it is full, is loading, is a replica)."""


class RedisLink:
    """One connection. ``run`` keeps it; whoever starts ``run`` owns it and ends it by cancelling.

    Attributes:
        went_down_at: on trio's clock, when it was lost; ``inf`` while it is there.
        on_changed: called when it comes and goes; synchronous.
    """

    def __init__(self, url: str, role: str) -> None:
        """``role`` names it in the log.

        Raises:
            ValueError: the URL is none of Redis's.
        """
        check_redis_url(url)
        self._pool: ConnectionPool[Any] = ConnectionPool.from_url(url, decode_components=True)  # knows URLs
        self._role = role
        self._connection: BaseConnection | None = None
        self.went_down_at = trio.current_time()
        self.on_changed: Callable[[], None] = lambda: None
        logging.getLogger("coredis").setLevel(logging.CRITICAL + 1)  # we tell; it would with a traceback each time

    @property
    def up(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    async def run(self, session: Callable[[], Awaitable[None]]) -> None:
        """Connect, let ``session`` work for as long as the connection lasts, and connect again, for ever.

        ``session`` is cancelled when the connection is lost, and may raise RedisAwayError to have a new one.
        """
        pause = FIRST_PAUSE_SECONDS
        reason = ""
        while True:
            connected_at = trio.current_time()
            try:
                await self._hold(session)
                lost = "the connection was lost"
            except* (RedisError, RedisAwayError, OSError, trio.TooSlowError) as errors:
                lost = _reason(errors)
            if lost != reason:
                _logger.warning("redis.away", link=self._role, reason=lost)
            reason = lost
            if trio.current_time() - connected_at > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _hold(self, session: Callable[[], Awaitable[None]]) -> None:
        assert self._pool.location is not None
        connection: BaseConnection = self._pool.connection_class(self._pool.location, **self._pool.connection_kwargs)

        async def keep(task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC114, ASYNC128 - the connection tells
            await connection.run(task_status=task_status)
            nursery.cancel_scope.cancel(reason="the connection was lost")

        try:
            async with trio.open_nursery() as nursery:
                with trio.fail_after(CONNECT_SECONDS):
                    await nursery.start(keep)
                self._change(connection)
                try:
                    await session()
                finally:
                    self._change(None)
        finally:
            _close_buffers(connection)

    def _change(self, connection: BaseConnection | None) -> None:
        self._connection = connection
        self.went_down_at = trio.current_time() if connection is None else inf
        if connection is not None:
            _logger.info("redis.connected", link=self._role)
        self.on_changed()

    def renew(self) -> None:
        """Give the connection up for a new one: what is asked on it is cancelled with the session."""
        if self._connection is not None:
            self._connection.invalidate("a new one is wanted")

    async def ask(self, *command: str | bytes | int, seconds: float = REPLY_SECONDS) -> Any:
        """What Redis answers, undecoded.

        Raises:
            RedisAwayError: there is no answer; whether Redis did it is not known then.
        """
        return (await self.ask_all([command], seconds))[0]

    async def ask_all(self, commands: Sequence[Command], seconds: float = REPLY_SECONDS) -> list[Any]:
        """What Redis answers to each, all sent at once. Raises as ``ask``: any may be done then."""
        connection = self._connection
        if connection is None:
            raise RedisAwayError("there is no connection to Redis")
        try:
            requests = [connection.create_request(_name(name), *rest, timeout=seconds) for name, *rest in commands]
            return [await request for request in requests]
        except TimeoutError as error:
            connection.invalidate("Redis does not answer")
            raise RedisAwayError("Redis does not answer") from error
        except (RedisError, ReferenceError) as error:
            raise RedisAwayError(str(error) or type(error).__name__) from error


def check_redis_url(url: str) -> None:
    """Refuse what is no URL of Redis's.

    Raises:
        ValueError: with the reason; without the URL, which may have a password in it.
    """
    try:
        parts = urlsplit(url)
        usable = bool(parts.path if parts.scheme == "unix" else parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
        parts = None
    if parts is None or not usable or parts.scheme not in {"redis", "rediss", "unix"}:
        raise ValueError("the Redis URL must be like redis://host:6379/0, rediss://… or unix:///path")


def _name(command: str | bytes | int) -> bytes:
    return command if isinstance(command, bytes) else str(command).encode()


def _close_buffers(connection: BaseConnection) -> None:
    """What coredis does itself unless connecting has failed; each attempt would leave six warnings behind."""
    for buffer in vars(connection).values():
        if isinstance(buffer, MemoryObjectReceiveStream | MemoryObjectSendStream):
            buffer.close()


def _reason(errors: BaseExceptionGroup[Any]) -> str:
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return str(first) or type(first).__name__
