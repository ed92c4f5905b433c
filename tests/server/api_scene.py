"""A client of the API in a world that keeps things, for one caller."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx

from providers.registry import ModelConfig
from server.records import AgentRecord, WorkingMemorySettings
from tests.harness.world import World

BASE = "http://lumos"
API = f"{BASE}/api/v1"

REPLAYING = ModelConfig(provider="replay", model="gpt4o-short")
HELPER = AgentRecord(
    id="helper",
    llm_config=REPLAYING,
    working_memory=WorkingMemorySettings(template={"name": None}, max_bytes=100),
)
"""An operator's agent with a working memory."""


class Caller:
    """Asks as one caller, and expects."""

    def __init__(self, world: World, headers: dict[str, str] | None = None) -> None:
        self._world = world
        self._headers = headers or {}

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The response, to a path under ``/api/v1``."""
        headers = self._headers | options.pop("headers", {})
        return await self._world.client.request(method, f"{API}{path}", headers=headers, **options)

    async def ask_path(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The response, to a whole path."""
        return await self._world.client.request(method, f"{BASE}{path}", headers=self._headers, **options)

    def open(self, method: str, path: str, **options: Any) -> AbstractAsyncContextManager[httpx.Response]:
        """The response while it comes."""
        return self._world.client.stream(method, f"{API}{path}", headers=self._headers, **options)

    async def data(self, method: str, path: str, status: int = 200, **options: Any) -> Any:
        """The ``data`` of a good answer."""
        response = await self.ask(method, path, **options)
        assert response.status_code == status, response.text
        payload = response.json()
        assert list(payload) == ["success", "data"]
        assert payload["success"] is True
        return payload["data"]

    async def gone(self, method: str, path: str, **options: Any) -> None:
        """It is done, and there is nothing to say."""
        response = await self.ask(method, path, **options)
        assert (response.status_code, response.content) == (204, b"")

    async def refused(self, status: int, method: str, path: str, **options: Any) -> Any:
        """The refusal, of that status, in the one shape."""
        response = await self.ask(method, path, **options)
        assert response.status_code == status, response.text
        payload = response.json()
        assert list(payload) == ["code", "message", "details", "timestamp"]
        return payload

    async def chat(self, agent_id: str, message: str = "hi", **body: Any) -> Any:
        """The whole answer of an agent."""
        return await self.data("POST", f"/agents/{agent_id}/chat/lumosai", json={"message": message} | body)
