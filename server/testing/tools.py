"""Tools on a virtual clock: a function that is not async is called where it is, for a thread would race the clock."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

from engine.function_tool import FunctionTool, tool
from engine.tool_threads import run_inline
from engine.tools import Tool
from server.tool_registry import ToolRegistry


def as_tool(given: Tool | Callable[..., Any]) -> Tool:
    """The tool, or one made of the function, without threads.

    Raises:
        TypeError: the function cannot be a tool.
    """
    if isinstance(given, FunctionTool):
        spec = given.spec
        return tool(name=spec.name, description=spec.description, run_sync=run_inline)(given.function)
    if inspect.isfunction(given) or inspect.ismethod(given):
        return tool(run_sync=run_inline)(given)
    return cast(Tool, given)


class InlineToolRegistry(ToolRegistry):
    """A server's tools, without threads."""

    def find(self, names: Sequence[str]) -> tuple[Tool, ...]:
        """As ``ToolRegistry``."""
        return tuple(map(as_tool, super().find(names)))
