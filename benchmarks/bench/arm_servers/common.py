# mypy: disable-error-code="import-not-found,untyped-decorator"
"""What the peers' servers have in common: their settings, their request and reply, and how they are run."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import orjson
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

UPSTREAM = os.environ.get("UPSTREAM", "http://127.0.0.1:8081/v1")
API_KEY = "sk-bench"

MAX_CONNECTIONS = 4096
"""To the upstream at once: no workload of ours ever waits in a peer's pool."""

MAX_IDLE_CONNECTIONS = 100
"""Kept alive by httpx clients; it is what the openai SDK keeps. httpcore gets slower with more of them, not faster."""

READ_SECONDS = 600.0
CONNECT_SECONDS = 60.0
"""More than the SDK's 5 s: a peer whose loop is busy with many starts is late, and does not fail besides."""

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Chat(BaseModel):
    """A request's body."""

    message: str
    model: str
    session_id: str = ""


Frames: TypeAlias = Callable[[Chat], AsyncIterator[bytes]]
"""Answers a request, event by event."""


def completion_request(chat: Chat) -> dict[str, Any]:
    """What a hand-written relay asks the upstream."""
    return {
        "model": chat.model,
        "messages": [{"role": "user", "content": chat.message}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def frame(text: str) -> bytes:
    """One delta as an event."""
    encoded: bytes = orjson.dumps(text)
    return b'data: {"content":' + encoded + b"}\n\n"


class Reframer:
    """Turns the bytes of an upstream's stream into our events, as many at once as came at once."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The events that these bytes complete; b"" for none."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        return b"".join([frame(text) for event in events if (text := self._text(event))])

    @staticmethod
    def _text(event: bytes) -> str | None:
        if not event.startswith(b"data: ") or event == b"data: [DONE]":
            return None
        choices = orjson.loads(event[6:])["choices"]
        return choices[0]["delta"].get("content") if choices else None


def add_routes(app: FastAPI, answer: Frames, run_agent: Frames | None = None) -> None:
    """``/chat``, ``/health`` and, with ``run_agent``, ``/agent``; Starlette cancels what a leaving client was told."""

    @app.post("/chat")
    async def chat(body: Chat) -> StreamingResponse:
        return _stream(answer(body))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    if run_agent is not None:

        @app.post("/agent")
        async def agent(body: Chat) -> StreamingResponse:
            return _stream(run_agent(body))


def _stream(frames: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(frames, media_type="text/event-stream", headers=_HEADERS)


def run(app: FastAPI) -> None:
    """Serve on 127.0.0.1:$PORT until SIGTERM, as ``uvicorn[standard]`` does in production, without an access log."""
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
