# mypy: disable-error-code="import-not-found"
"""The openai SDK's client as the peers that stand on it share it: one for all requests, with room for every stream."""

from __future__ import annotations

from httpx2 import Limits, Timeout
from openai import AsyncOpenAI, DefaultAioHttpClient, DefaultAsyncHttpx2Client

from .common import API_KEY, CONNECT_SECONDS, MAX_CONNECTIONS, MAX_IDLE_CONNECTIONS, READ_SECONDS, UPSTREAM


def open_client(*, aiohttp: bool = False) -> AsyncOpenAI:
    """A client whose owner closes it; over aiohttp, as the SDK's README offers, or over its default HTTP client."""
    limits = Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_IDLE_CONNECTIONS)
    make = DefaultAioHttpClient if aiohttp else DefaultAsyncHttpx2Client
    timeout = Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    http_client = make(limits=limits, timeout=timeout, trust_env=False)
    return AsyncOpenAI(base_url=UPSTREAM, api_key=API_KEY, timeout=timeout, http_client=http_client)
