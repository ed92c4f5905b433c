"""A connection to Redis or Valkey that comes back by itself; everybody's commands share it, in the order they are sent.

What the connection is made of is behind ``RedisConnection``: a real one needs coredis (``redis_connection``), the
simulation's is to a Redis in memory (``simulation.memory_link``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit

import structlog
import trio

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


class RedisConnection(Protocol):
    """One connection, from the attempt to its end."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC114 - ``Link`` starts it
        """Connect, say so, and keep the connection; ends when it is lost.

        Raises:
            RedisAwayError: it cannot be had; or why it was lost. OSError: the same.
        """
        ...

    async def ask_all(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Redis's answer to each, all sent at once. A cancelled caller leaves answers that nobody wants.

        Raises:
            RedisAwayError: there is no answer, or not in time (the connection is given up then), or it is an error.
        """
        ...

    def invalidate(self, reason: str) -> None:
        """Have ``run`` end."""
        ...

    def close(self) -> None:
        """Let go of what is left after ``run``, also if that has failed."""
        ...


class Link:
    """One connection. ``run`` keeps it; whoever starts ``run`` owns it and ends it by cancelling.

    Attributes:
        went_down_at: on trio's clock, when it was lost; ``inf`` while it is there.
        on_changed: called when it comes and goes; synchronous.
    """

    def __init__(self, role: str, connect: Callable[[], RedisConnection]) -> None:
        """``role`` names it in the log; ``connect`` makes what is to be run for each attempt."""
        self._role = role
        self._connect = connect
        self._connection: RedisConnection | None = None
        self.went_down_at = trio.current_time()
        self.on_changed: Callable[[], None] = lambda: None

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
            except* (RedisAwayError, OSError, trio.TooSlowError) as errors:
                lost = reason_of(errors)
            if lost != reason:
                _logger.warning("redis.away", link=self._role, reason=lost)
            reason = lost
            if trio.current_time() - connected_at > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _hold(self, session: Callable[[], Awaitable[None]]) -> None:
        connection = self._connect()

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
            connection.close()

    def _change(self, connection: RedisConnection | None) -> None:
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
        if self._connection is None:
            raise RedisAwayError("there is no connection to Redis")
        return await self._connection.ask_all(commands, seconds)


class RedisLink(Link):
    """A link to a real Redis or Valkey."""

    def __init__(self, url: str, role: str) -> None:
        """``role`` names it in the log.

        Raises:
            ValueError: the URL is none of Redis's.
            ImportError: coredis is not there.
        """
        from .redis_connection import connector  # noqa: PLC0415 - coredis is an extra, and not for other links

        check_redis_url(url)
        super().__init__(role, connector(url))


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


def reason_of(error: BaseException) -> str:
    """What the first of a group's errors says."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
