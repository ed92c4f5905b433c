"""Tools that do not do what they are for; the model sees them as the ones that they stand for."""

from __future__ import annotations

import trio

from engine.provider import ToolSpec
from engine.tools import Tool, ToolContext, ToolResult


class _StandIn:
    def __init__(self, tool: Tool) -> None:
        self._tool = tool

    @property
    def spec(self) -> ToolSpec:
        """As the tool's."""
        return self._tool.spec


class HangingTool(_StandIn):
    """Takes ``seconds`` before it does anything; ``inf`` is for ever. Can be cancelled."""

    def __init__(self, tool: Tool, seconds: float) -> None:
        super().__init__(tool)
        self._seconds = seconds

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        """Wait, then call the tool."""
        await trio.sleep(self._seconds)
        return await self._tool.call(arguments, context)


class RaisingTool(_StandIn):
    """Raises instead of doing anything."""

    def __init__(self, tool: Tool, error: Exception) -> None:
        super().__init__(tool)
        self._error = error

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:  # noqa: ARG002 - a tool is called so
        """Raise the error."""
        await trio.lowlevel.checkpoint()
        raise self._error
