"""The client's side of a stream: its events, with what a reader notes of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import msgspec
import trio

from engine import Event
from providers.sse import SSEParser

_decode_event = msgspec.json.Decoder(Event).decode


class StreamedEvents:
    """The events of a streamed response with ids and arrival times (on trio's clock), while they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[Event] = []
        self.ids: list[str] = []
        self.arrivals: list[float] = []
        self._body = response.extensions["body"]
        self._parser = SSEParser()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while chunk := await self._body.receive():
            for frame in self._parser.feed(chunk):
                event: Event = _decode_event(frame.data)
                self.events.append(event)
                self.ids.append(frame.id)
                self.arrivals.append(trio.current_time())
                yield event

    @property
    def run_id(self) -> str:
        """The run's id, from the header."""
        return str(self.response.headers["X-Run-Id"])
