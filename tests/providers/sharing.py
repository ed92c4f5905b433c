"""For tests on real sockets: pairs of them, one who watches all of them, as a server has, and who takes."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio

from providers.readiness import Readiness, share_readiness
from providers.tcp import TcpStream

Pair = tuple[TcpStream, socket.socket]


def connected() -> Iterator[Pair]:
    """A stream and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        near.setblocking(False)
        yield TcpStream(near), far


def reset(far: socket.socket) -> None:
    """Close it with an RST."""
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()


class Taker:
    """Takes what comes, until it has had so many."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.taken: list[bytes] = []
        self.in_tasks: list[trio.lowlevel.Task | None] = []

    def take(self, data: bytes) -> bool:
        """Whether it wants more."""
        self.taken.append(data)
        self.in_tasks.append(task_or_none())
        return len(self.taken) < self.most


def task_or_none() -> trio.lowlevel.Task | None:
    """The task that runs now; None in trio's own loop."""
    try:
        return trio.lowlevel.current_task()
    except RuntimeError:
        return None


@asynccontextmanager
async def sharing() -> AsyncIterator[Readiness | None]:
    """While the block runs, one reads for all who wait; None where a system has no epoll."""
    with share_readiness() as readiness:
        async with trio.open_nursery() as nursery:
            if readiness is not None:
                nursery.start_soon(readiness.run)
            yield readiness
            nursery.cancel_scope.cancel()
