# mypy: disable-error-code="import-not-found"
"""A relay as a good engineer writes it with FastAPI and aiohttp's client: one session, a write for each read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from fastapi import FastAPI

from .common import (
    API_KEY,
    CONNECT_SECONDS,
    DONE,
    READ_SECONDS,
    UPSTREAM,
    Chat,
    Reframer,
    add_routes,
    completion_request,
    run,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=75),
        headers={"Authorization": f"Bearer {API_KEY}"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS),
    ) as app.state.session:
        yield


app = FastAPI(lifespan=lifespan)


async def answer(chat: Chat) -> AsyncIterator[bytes]:
    reframer = Reframer()
    session: aiohttp.ClientSession = app.state.session
    async with session.post(f"{UPSTREAM}/chat/completions", json=completion_request(chat)) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_any():
            if frames := reframer.feed(chunk):
                yield frames  # noqa: ASYNC119 - as FastAPI wants it
    yield DONE


add_routes(app, answer)


if __name__ == "__main__":
    run(app)
