"""A model server made of bytes: each request is answered by a script of its own, good or bad HTTP alike."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import trio

from providers.chunked import LAST_CHUNK, chunked
from server.testing.vendor_bytes import STREAM_HEAD, Act, answer, play, read_request
from tests.harness.vendor import text_event

__all__ = ["DONE_EVENT", "HELLO", "LAST_CHUNK", "RawVendor", "answer"]

DONE_EVENT = b"data: [DONE]\n\n"
HELLO: tuple[Act, ...] = (STREAM_HEAD, chunked(text_event("hello")), chunked(DONE_EVENT) + LAST_CHUNK)
"""An answer as it should be: it says hello and leaves the connection open for the next request."""


class RawVendor:
    """Answers its n-th request, whatever its connection, with the n-th script, and all further ones with ``HELLO``.

    A script that closes nothing leaves its connection open for the next request; "hang" sends nothing more.
    ``requests`` holds the bytes of each request.
    """

    def __init__(self, *scripts: Iterable[Act]) -> None:
        self.requests: list[bytes] = []
        self._scripts = iter(scripts)

    def start(self, nursery: trio.Nursery, listener: trio.abc.Listener[Any]) -> None:
        """Serve in the nursery until it is cancelled; the listener takes connections from now on."""
        nursery.start_soon(trio.serve_listeners, self._serve_connection, [listener])

    async def _serve_connection(self, stream: Any) -> None:
        # A client that has gone is no fault here: what a test looks at is the client's side.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while request := await read_request(stream):
                self.requests.append(request)
                await play(stream, next(self._scripts, HELLO))
        await trio.aclose_forcefully(stream)
