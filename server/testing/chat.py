"""One chat as a client of Lumos's sees it: what came, and when, in virtual seconds since the request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
import msgspec
import trio

from engine import (
    AgentStopped,
    Error,
    Event,
    GenerationComplete,
    ReasoningDelta,
    StepComplete,
    TextDelta,
    ToolCallComplete,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    UsageUpdate,
)
from engine.events import TERMINAL_EVENT_TYPES, CallStatus, TerminalEvent
from providers.http import open_client

from .client_network import ClientLine, ClientNetwork
from .streamed_events import StreamedEvents

CLOSE_SECONDS = 1.0
"""Limit of the shield around closing the client, which waits for nothing."""


@dataclass
class SeenToolCall:
    """A tool call as the client saw it.

    Attributes:
        arguments: the object that the model wrote, or its text as far as it came if that is no JSON.
        status, result, ended: None while there is no result.
        started, ended: seconds since the request.
    """

    call_id: str
    name: str
    started: float
    arguments: Any = None
    status: CallStatus | None = None
    result: Any = None
    ended: float | None = None


class ChatRun:
    """A run that is read: ``async with lumos.open_chat(...) as run``. Leaving the block closes its connection.

    Times are virtual seconds since the request, exact to the nanosecond.

    Attributes:
        asked_at: when the request was made, on trio's clock.
        status_code: of the response; None if none came.
        headers: of the response.
        refusal: the body of a response that is no stream, as JSON or text.
        broken: why the connection to Lumos broke, if it did.
    """

    def __init__(self, request: httpx.Request, line: ClientLine, prepare: Callable[[], Awaitable[None]]) -> None:
        """``VirtualLumos`` makes them; ``prepare`` comes before the request."""
        self.asked_at = 0.0
        self.status_code: int | None = None
        self.headers: Mapping[str, str] = {}
        self.refusal: Any = None
        self.broken: str | None = None
        self._request = request
        self._line = line
        self._prepare = prepare
        self._client = open_client(line.connect)
        self._stream: StreamedEvents | None = None
        self._ended_at: float | None = None

    async def __aenter__(self) -> ChatRun:
        await self._prepare()
        self.asked_at = trio.current_time()
        try:
            response = await self._client.send(self._request, stream=True)
            self.status_code, self.headers = response.status_code, response.headers
            if response.headers.get("Content-Type", "").startswith("text/event-stream"):
                self._stream = StreamedEvents(response)
            else:
                self.refusal = _decoded(await response.aread())
                self._ended_at = trio.current_time()
        except httpx.TransportError as error:
            self._break(error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await self.leave()

    def __aiter__(self) -> ChatRun:
        return self

    async def __anext__(self) -> Event:
        """The next event; the end of the stream, or a broken connection, ends the loop."""
        if self._stream is None or self._ended_at is not None:
            raise StopAsyncIteration
        try:
            return await anext(self._stream)
        except httpx.TransportError as error:
            self._break(error)
        except StopAsyncIteration:
            self._ended_at = trio.current_time()
        raise StopAsyncIteration

    async def read(self, *, events: int | None = None, characters: int | None = None) -> None:
        """Read until so many more events, or so many characters of text in all, have come; by default to the end."""
        wanted = None if events is None else len(self.events) + events
        while (wanted is None or len(self.events) < wanted) and (characters is None or len(self.text) < characters):
            if await anext(self, None) is None:
                return

    async def leave(self) -> None:
        """Close the connection as a client that goes; what becomes of the run is up to its ``on_disconnect``."""
        if self._ended_at is None:
            self._ended_at = trio.current_time()
        await self._client.aclose()

    async def stop(self) -> httpx.Response:
        """Ask the server, on another connection, to stop the run; what it still says is there to be read."""
        async with open_client(self._line.connect) as client:
            return await client.post(self._request.url.join(f"/api/v1/runs/{self.run_id}/stop"))

    def resume(self, *, network: ClientNetwork | None = None) -> ChatRun:
        """Read the run on after what was seen here, on a connection of its own: ``async with run.resume() as rest``."""
        headers = {"Last-Event-ID": self.ids[-1]} if self.ids else {}
        url = self._request.url.join(f"/api/v1/runs/{self.run_id}/events")
        request = self._client.build_request("GET", url, headers=headers)
        return ChatRun(request, ClientLine(self._line.network, network), self._prepare)

    def cut(self, *, reset: bool = False) -> None:
        """Have the network break the connection, now."""
        self._line.cut(reset=reset)

    def _break(self, error: httpx.TransportError) -> None:
        self.broken = str(error) or type(error).__name__
        self._ended_at = trio.current_time()

    def _since(self, at: float) -> float:
        return round(at - self.asked_at, 9)

    @property
    def run_id(self) -> str:
        """The run's id; empty if there is none."""
        return self.headers.get("X-Run-Id", "")

    @property
    def events(self) -> list[Event]:
        """What has come, see ``engine.events``."""
        return [] if self._stream is None else self._stream.events

    @property
    def ids(self) -> list[str]:
        """The events' ids."""
        return [] if self._stream is None else self._stream.ids

    @property
    def arrivals(self) -> list[float]:
        """When each event came."""
        return [] if self._stream is None else [self._since(at) for at in self._stream.arrivals]

    @property
    def timed_events(self) -> list[tuple[float, Event]]:
        """The events with their arrivals."""
        return list(zip(self.arrivals, self.events, strict=True))

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(event.content for event in self.events if isinstance(event, TextDelta))

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(event.content for event in self.events if isinstance(event, ReasoningDelta))

    @property
    def terminal(self) -> TerminalEvent | None:
        """The event that ended the run; None if it has not come."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, TERMINAL_EVENT_TYPES) else None

    @property
    def ttfb(self) -> float | None:
        """When the first content came, whatever it was: text, reasoning, a tool call. None if none did."""
        return self._first(TextDelta, ReasoningDelta, ToolCallStart)

    @property
    def ttft(self) -> float | None:
        """When the first text of the answer came; None if none did."""
        return self._first(TextDelta)

    def _first(self, *kinds: type[Event]) -> float | None:
        return next((at for at, event in self.timed_events if isinstance(event, kinds)), None)

    @property
    def elapsed(self) -> float:
        """How long it was read, until now if it still is."""
        return self._since(trio.current_time() if self._ended_at is None else self._ended_at)

    @property
    def usage(self) -> Usage | None:
        """What was told of tokens last."""
        for event in reversed(self.events):
            if isinstance(event, GenerationComplete | AgentStopped | Error | UsageUpdate) and event.usage is not None:
                return event.usage
        return None

    @property
    def tool_calls(self) -> list[SeenToolCall]:
        """The tool calls, in the order in which they began."""
        calls: dict[str, SeenToolCall] = {}
        written: dict[str, str] = {}
        for at, event in self.timed_events:
            match event:
                case ToolCallStart(call_id, name, _, arguments):
                    calls[call_id] = SeenToolCall(call_id, name, at, arguments)
                case ToolCallDelta(call_id, fragment) if call_id in calls:
                    written[call_id] = written.get(call_id, "") + fragment
                    calls[call_id].arguments = _decoded(written[call_id].encode())
                case ToolCallComplete(call_id, status, result) if call_id in calls:
                    call = calls[call_id]
                    call.status, call.result, call.ended = status, result, at
                case StepComplete(tool_calls=called):
                    for told in called:
                        if told.call_id in calls:
                            calls[told.call_id].arguments = told.arguments
        return list(calls.values())


def _decoded(body: bytes) -> Any:
    """As JSON, or as text if it is none."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode(errors="replace")
