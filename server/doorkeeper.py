"""Takes connections in, and turns away those that are too many."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from hypercorn.trio.tcp_server import MAX_RECV

from .errors import bare_answer

LINGER_SECONDS = 2.0
"""What a client that was answered early gets to read its answer before the connection closes."""

MAX_REFUSING = 100
"""Connections over the ceiling that get to read why; more of them are reset (each costs a descriptor meanwhile)."""

FULL_SECONDS = 0.1
"""How long no connection is accepted where the system has no descriptor, or no memory, for one more."""

_FULL = bare_answer("too many connections")
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}

_logger = logging.getLogger("lumos.serving")


async def accept_all(listener: trio.abc.Listener[Any], take: Callable[[Any], None]) -> None:
    """Hand over each connection as it comes, until cancelled; closes the listener."""
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                code, reason = errno.errorcode[error.errno], os.strerror(error.errno)
                _logger.error("accept returned %s (%s); retrying in %s seconds", code, reason, FULL_SECONDS)
                await trio.sleep(FULL_SECONDS)
            else:
                take(stream)


class Doorkeeper:
    """Turns away connections that are too many, at the price of a few bytes each."""

    def __init__(self) -> None:
        self._refusing = 0

    async def refuse(self, stream: Any) -> None:
        """Say so in one write, wait a moment for the client to read it, and close."""
        if self._refusing >= MAX_REFUSING:
            stream.reset()
            stream.close()
            return
        self._refusing += 1
        try:
            with trio.move_on_after(LINGER_SECONDS), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                stream.send_now(_FULL)
                await stream.send_eof()
                while await stream.receive_some(MAX_RECV):  # closing on unread bytes would reset the answer
                    pass
        finally:
            self._refusing -= 1
            stream.reset()
            stream.close()
