# mypy: disable-error-code="import-not-found"
"""A relay as a good engineer writes it with FastAPI and httpx: one client, raw chunks, no per-event objects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI

from .common import (
    API_KEY,
    CONNECT_SECONDS,
    DONE,
    MAX_CONNECTIONS,
    MAX_IDLE_CONNECTIONS,
    READ_SECONDS,
    UPSTREAM,
    Chat,
    Reframer,
    add_routes,
    completion_request,
    run,
)

client = httpx.AsyncClient(
    base_url=UPSTREAM,
    headers={"Authorization": f"Bearer {API_KEY}"},
    limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_IDLE_CONNECTIONS),
    timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
    trust_env=False,
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


async def answer(chat: Chat) -> AsyncIterator[bytes]:
    reframer = Reframer()
    async with client.stream("POST", "/chat/completions", json=completion_request(chat)) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            if frames := reframer.feed(chunk):
                yield frames  # noqa: ASYNC119 - as FastAPI wants it
    yield DONE


add_routes(app, answer)


if __name__ == "__main__":
    run(app)
