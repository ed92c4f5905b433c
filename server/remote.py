"""A client for a running Lumos: its event stream as engine events, with the time each one arrived."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import trio

from engine.events import TERMINAL_EVENT_TYPES, Event
from providers.sse import SSEParser

_decode_event = msgspec.json.Decoder(Event).decode


class RemoteError(Exception):
    """The server refused the request, or its stream broke; the text is for people."""


class RemoteEvents:
    """Iterates the events of one response; after a step, ``arrived_at`` is when its bytes came, on trio's clock."""

    def __init__(self, response: httpx.Response) -> None:
        self._body = response.extensions["body"]
        self._parser = SSEParser()
        self._ready: list[Event] = []
        self._ended = False
        self.arrived_at = 0.0

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            chunk = await self._body.receive()
            if not chunk:
                raise RemoteError("the server's stream broke off without a terminal event")
            self.arrived_at = trio.current_time()
            self._ready = [_decode_event(frame.data) for frame in self._parser.feed(chunk)][::-1]
        event = self._ready.pop()
        self._ended = isinstance(event, TERMINAL_EVENT_TYPES)
        return event


@asynccontextmanager
async def remote_run(
    client: httpx.AsyncClient, base_url: str, agent_id: str, body: dict[str, Any], *, way: str = "/stream"
) -> AsyncIterator[RemoteEvents]:
    """Start a run on the server and read its events; leaving the block closes the connection.

    ``client`` is from ``providers.http.open_client`` and stays the caller's to close; ``body`` is the chat request
    (``server.requests.ChatRequest``); ``way`` is the last part of the path, ``/stream`` or ``/simulated``.

    Raises:
        RemoteError: the server cannot be reached, or answered with another status than 200.
    """
    url = f"{base_url.rstrip('/')}/api/v1/agents/{agent_id}/chat/lumosai{way}"
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise RemoteError(_refusal(response.status_code, await response.aread()))
            yield RemoteEvents(response)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise RemoteError(f"{base_url}: {error}") from error


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"HTTP {status}: {msgspec.json.decode(body)['message']}"
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"HTTP {status}"
