"""Model servers for tests: a Quart-Trio app that speaks OpenAI's chat completions, and one that plays any bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
import trio
from quart import Response, request
from quart.wrappers.response import ResponseBody
from quart_trio import QuartTrio

from engine.pieces import FinishPiece, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.chunked import chunked
from providers.recording import Recording
from server.testing.vendor_bytes import PLAIN_STREAM_HEAD, STREAM_HEAD, Act
from server.testing.vendor_bytes import play as play_acts

__all__ = [
    "PLAIN_STREAM_HEAD",
    "STREAM_HEAD",
    "Act",
    "RecordedBody",
    "VendorCall",
    "VendorServer",
    "chat_event",
    "chunked",
    "play_script",
    "text_event",
]


@dataclass
class VendorCall:
    """One request that a model server got, and when it began and ended, on trio's clock."""

    started_at: float
    body: Any
    ended_at: float | None = None
    finished: bool = False


@dataclass
class VendorServer:
    """A model server that answers requests with recordings, in their timing; ``calls`` is what it saw.

    The first request gets the recording, the next one the first of ``further``, and so on; the last is for all others.
    """

    recording: Recording
    further: Sequence[Recording] = ()
    calls: list[VendorCall] = field(default_factory=list)

    def app(self) -> QuartTrio:
        """The app to serve."""
        app = QuartTrio("vendor", static_folder=None)

        @app.post("/v1/chat/completions")
        async def chat_completions() -> Response:
            call = VendorCall(trio.current_time(), msgspec.json.decode(await request.get_data()))
            recordings = [self.recording, *self.further]
            recording = recordings[min(len(self.calls), len(recordings) - 1)]
            self.calls.append(call)
            response = Response(RecordedBody(recording, call), content_type="text/event-stream")
            response.timeout = None
            return response

        return app


class RecordedBody(ResponseBody):
    """The recording as a chat-completions stream: one chunk of the body for each recorded read."""

    def __init__(self, recording: Recording, call: VendorCall) -> None:
        self._reads = iter(recording.reads)
        self._call = call

    async def __aenter__(self) -> RecordedBody:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.ended_at = trio.current_time()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._call.finished:
            raise StopAsyncIteration
        read = next(self._reads, None)
        if read is None:
            self._call.finished = True
            return b"data: [DONE]\n\n"
        await trio.sleep_until(self._call.started_at + read.at_ns / 1e9)
        return b"".join(chat_event(piece) for piece in read.pieces)


def chat_event(piece: Piece) -> bytes:
    """The piece as one event of a chat-completions stream."""
    match piece:
        case TextPiece(text):
            chunk: Any = {"choices": [{"index": 0, "delta": {"content": text}}]}
        case ReasoningPiece(text):
            chunk = {"choices": [{"index": 0, "delta": {"reasoning_content": text}}]}
        case ToolCallPiece(index, call_id, name, fragment):
            function = {"arguments": fragment} | ({"name": name} if name else {})
            call = {"index": index, "function": function} | ({"id": call_id, "type": "function"} if call_id else {})
            chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}
        case FinishPiece(reason):
            chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
        case UsagePiece():
            usage = {"prompt_tokens": piece.input_tokens, "completion_tokens": piece.output_tokens}
            chunk = {"choices": [], "usage": usage}
        case _:
            raise AssertionError(piece)
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def text_event(text: str) -> bytes:
    """An event that says the text."""
    return chat_event(TextPiece(text))


async def play_script(listener: trio.abc.Listener[Any], script: Sequence[Act]) -> None:
    """Answer each connection's first request with the script's bytes, whatever they are. Runs until cancelled."""

    async def play(stream: Any) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += await stream.receive_some()
        await play_acts(stream, script)
        while await stream.receive_some():
            pass
        await stream.aclose()

    async def play_quietly(stream: Any) -> None:
        # A client that has gone is no fault here: what a test looks at is the client's side.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await play(stream)

    await trio.serve_listeners(play_quietly, [listener])
