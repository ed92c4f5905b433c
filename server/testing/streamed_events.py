"""The client's side of a stream: its events, with what a reader notes of them."""

from __future__ import annotations

from collections import deque

import httpx
import msgspec
import trio

from engine import Event
from providers.sse import SSEParser

_decode_event = msgspec.json.Decoder(Event).decode


class StreamedEvents:
    """The events of a streamed response with ids and arrival times (on trio's clock), while they come.

    ``async for`` gives each event once, and may be left and begun again. Raises ``httpx.TransportError`` if the
    connection breaks; what came before is given first.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[Event] = []
        self.ids: list[str] = []
        self.arrivals: list[float] = []
        self._body = response.extensions["body"]
        self._parser = SSEParser()
        self._ready: deque[tuple[Event, str, float]] = deque()

    def __aiter__(self) -> StreamedEvents:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            chunk = await self._body.receive()
            if not chunk:
                raise StopAsyncIteration
            now = trio.current_time()
            self._ready += [(_decode_event(frame.data), frame.id, now) for frame in self._parser.feed(chunk)]
        event, frame_id, arrived_at = self._ready.popleft()
        self.events.append(event)
        self.ids.append(frame_id)
        self.arrivals.append(arrived_at)
        return event

    @property
    def run_id(self) -> str:
        """The run's id, from the header."""
        return str(self.response.headers["X-Run-Id"])
