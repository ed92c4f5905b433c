"""A client for a running Lumos: its event stream as engine events, with the time each one arrived."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import trio

from engine.events import TERMINAL_EVENT_TYPES, Event
from engine.spec import MAX_RUN_BYTES
from providers.sse import EventTooLargeError, SSEParser

MAX_EVENT_BYTES = 2 * MAX_RUN_BYTES
"""The last event repeats the whole answer, which its run bounds; the rest is room."""

_HOW_TO_SHOW_A_KEY = " (lumos chat takes the key from LUMOS_API_KEY, or from --api-key)"

_decode_event = msgspec.json.Decoder(Event).decode


class RemoteError(Exception):
    """The server refused the request, or its stream broke; the text is for people."""


class RemoteEvents:
    """Iterates the events of one response; after a step, ``arrived_at`` is when its bytes came, on trio's clock."""

    def __init__(self, response: httpx.Response) -> None:
        self._body = response.extensions["body"]
        self._parser = SSEParser(MAX_EVENT_BYTES)
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
            self._ready = self._decode(chunk)[::-1]
        event = self._ready.pop()
        self._ended = isinstance(event, TERMINAL_EVENT_TYPES)
        return event

    def _decode(self, chunk: bytes) -> list[Event]:
        try:
            return [_decode_event(frame.data) for frame in self._parser.feed(chunk)]
        except (msgspec.DecodeError, UnicodeDecodeError, EventTooLargeError) as error:
            raise RemoteError(f"the server sent something else than Lumos's events: {error}") from error


@asynccontextmanager
async def remote_run(
    client: httpx.AsyncClient,
    base_url: str,
    agent_id: str,
    body: dict[str, Any],
    *,
    way: str = "/stream",
    api_key: str | None = None,
) -> AsyncIterator[RemoteEvents]:
    """Start a run on the server and read its events; leaving the block closes the connection.

    ``client`` is from ``providers.http.open_client`` and stays the caller's to close; ``body`` is the chat request
    (``server.requests.ChatRequest``); ``way`` is the last part of the path, ``/stream`` or ``/simulated``;
    ``api_key`` is for a server that asks for one.

    Raises:
        RemoteError: the server cannot be reached, answered with something else than a stream, or broke it off.
    """
    url = f"{base_url.rstrip('/')}/api/v1/agents/{quote(agent_id, safe='')}/chat/lumosai{way}"
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise RemoteError("the API key has characters that no key has")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with client.stream("POST", url, json=body, headers=headers) as response:
            await _check_answer(response, keyed=bool(api_key))
            yield RemoteEvents(response)
    except httpx.UnsupportedProtocol as error:
        raise RemoteError(f"{base_url} is not an http or https URL") from error
    except httpx.ConnectError as error:
        raise RemoteError(f"cannot reach {base_url}: {error}") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise RemoteError(f"{base_url}: {error}") from error


async def _check_answer(response: httpx.Response, *, keyed: bool) -> None:
    content_type = response.headers.get("content-type", "nothing")
    if response.status_code != httpx.codes.OK:
        hint = "" if keyed or response.status_code != httpx.codes.UNAUTHORIZED else _HOW_TO_SHOW_A_KEY
        raise RemoteError(_refusal(response.status_code, await response.aread()) + hint)
    if not content_type.startswith("text/event-stream"):
        raise RemoteError(f"the server answered with {content_type[:80]}, not with a stream: is it Lumos?")


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"HTTP {status}: {msgspec.json.decode(body)['message']}"
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"HTTP {status}"
