"""A connection to a real Redis or Valkey, by coredis.

There is no pool. coredis 6.9's loses a slot when a task is cancelled while it connects, and a wake-up when one is
cancelled while it waits; here a task of the link's own connects, and a cancelled caller leaves an answer that nobody
wants, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from coredis.connection import BaseConnection
from coredis.exceptions import RedisError
from coredis.pool import ConnectionPool

from .redis_link import Command, RedisAwayError, reason_of


def connector(url: str) -> Callable[[], CoredisConnection]:
    """What makes a connection to that URL for each attempt."""
    pool: ConnectionPool[Any] = ConnectionPool.from_url(url, decode_components=True)  # knows URLs
    logging.getLogger("coredis").setLevel(logging.CRITICAL + 1)  # we tell; it would with a traceback each time

    def connect() -> CoredisConnection:
        assert pool.location is not None
        return CoredisConnection(pool.connection_class(pool.location, **pool.connection_kwargs))

    return connect


class CoredisConnection:
    """A ``RedisConnection``: coredis's, with our errors."""

    def __init__(self, connection: BaseConnection) -> None:
        self._connection = connection

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC114, ASYNC128 - coredis tells
        """Connect, say so, and keep the connection. Raises RedisAwayError, OSError."""
        try:
            await self._connection.run(task_status=task_status)
        except* RedisError as errors:
            raise RedisAwayError(reason_of(errors)) from errors

    async def ask_all(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Redis's answer to each, undecoded. Raises RedisAwayError."""
        create = self._connection.create_request
        try:
            requests = [create(_name(name), *rest, timeout=seconds) for name, *rest in commands]
            return [await request for request in requests]
        except TimeoutError as error:
            self._connection.invalidate("Redis does not answer")
            raise RedisAwayError("Redis does not answer") from error
        except (RedisError, ReferenceError) as error:
            raise RedisAwayError(str(error) or type(error).__name__) from error

    def invalidate(self, reason: str) -> None:
        """Have ``run`` end."""
        self._connection.invalidate(reason)

    def close(self) -> None:
        """What coredis does itself unless connecting has failed; each attempt would leave six warnings behind."""
        for buffer in vars(self._connection).values():
            if isinstance(buffer, MemoryObjectReceiveStream | MemoryObjectSendStream):
                buffer.close()


def _name(command: str | bytes | int) -> bytes:
    return command if isinstance(command, bytes) else str(command).encode()
