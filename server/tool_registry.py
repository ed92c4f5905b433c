"""All tools that agents can name: the built-in ones, those of installed packages, and those of named sources (MCP).

An agent's record names tools as ``calculator``, or as ``files.read`` and ``files.*`` for those of a source ``files``.
The model sees ``files_read``: vendors take no dots in names.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from engine.builtin_tools import BUILT_IN_TOOLS
from engine.function_tool import TOOL_NAME, tool
from engine.provider import ToolSpec
from engine.tool_schema import digestible
from engine.tools import Tool, ToolContext, ToolResult

ENTRY_POINT_GROUP = "lumos.tools"
MAX_NAME_CHARS = 64

_logger = logging.getLogger(__name__)

_TOOL_NAME = re.compile(TOOL_NAME)
_SOURCE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")


class UnknownToolError(LookupError):
    """An agent names a tool that there is not. The text says which there are."""

    def __init__(self, name: str, known: Sequence[str], hint: str = "") -> None:
        super().__init__(f"there is no tool {name[:200]!r}; there are: {', '.join(known) or 'none'}{hint}")
        self.name = name
        self.known = tuple(known)


class ToolPluginError(UnknownToolError):
    """A tool is not there, and a package that may have brought it could not be loaded. The text says which and why."""


class ToolNameError(ValueError):
    """Two tools have one name, or one has a name that cannot be used. The text says which tools."""


class ToolSource(Protocol):
    """Where agents get their tools from."""

    def find(self, names: Sequence[str]) -> tuple[Tool, ...]:
        """The tools of these names, in order, each once.

        Raises:
            UnknownToolError: there is none of a name.
            ToolNameError: two of them would have the same name.
        """
        ...


class NamedToolSource(Protocol):
    """Tools that come and go together, such as those of one MCP server."""

    def tools(self) -> Mapping[str, Tool]:
        """Those there are now, by their names at the source. Must not block; asked at each look-up."""
        ...


class ToolRegistry:
    """Built-in tools, entry points of the group ``lumos.tools``, and named sources.

    Entry points are loaded at the first look-up, once. One that cannot be loaded is reported when a tool is wanted that
    nobody else has, so that it stops only the agents that need it; so is a name that several have when it is wanted.

    Args:
        sources: by the name before the dot.
        built_in: by name.
        plugins: gives the entry points.

    Raises:
        ToolNameError: a source's name cannot be used.
    """

    def __init__(
        self,
        sources: Mapping[str, NamedToolSource] | None = None,
        *,
        built_in: Mapping[str, Tool] = BUILT_IN_TOOLS,
        plugins: Callable[[], Iterable[EntryPoint]] = lambda: entry_points(group=ENTRY_POINT_GROUP),
    ) -> None:
        self._sources = dict(sources or {})
        self._built_in = dict(built_in)
        self._plugins = plugins
        self._loaded: _LoadedPlugins | None = None
        self._made: dict[tuple[str, str], tuple[Tool, _SourceTool | str]] = {}
        for name in self._sources:
            if not _SOURCE_NAME.fullmatch(name):
                raise ToolNameError(
                    f"{name!r} is no name for a source of tools: up to 32 letters, digits, _ and -, "
                    "beginning with a letter or _"
                )

    def find(self, names: Sequence[str]) -> tuple[Tool, ...]:
        """The tools of these names, in order, each once. ``files.*`` is all that source ``files`` has now.

        Of that, a tool whose schema cannot be used is left out, with a warning in the log; named itself it is an
        error.

        Raises:
            ToolPluginError: nobody has one of them, and a package's entry point could not be loaded.
            UnknownToolError: nobody has one of them.
            ToolNameError: two tools have the same name, or would have it for the model; or one cannot be used.
        """
        found: dict[str, Tool] = {}
        for name in names:
            found.update(self._find(name))
        seen: dict[str, str] = {}
        for name, found_tool in found.items():
            shown = found_tool.spec.name
            if shown in seen:
                raise ToolNameError(f"the model would see both {seen[shown]} and {name} as {shown!r}; leave one out")
            seen[shown] = name
        return tuple(found.values())

    def names(self) -> list[str]:
        """The names of all tools there are now, in order; loads the entry points."""
        own = {*self._built_in, *self._load().tools}
        return sorted(own) + sorted(f"{source}.{name}" for source in self._sources for name in self._tools_of(source))

    def usable(self) -> dict[str, Tool]:
        """All tools that can be had now, by name, in the order of ``names``; what ``find`` refuses is left out."""
        found: dict[str, Tool] = {}
        for name in self.names():
            with suppress(ToolNameError, UnknownToolError):
                found.update(self._find(name))
        return found

    def plugin_errors(self) -> dict[str, str]:
        """Why which entry point could not be loaded."""
        return dict(self._load().broken)

    def _find(self, name: str) -> dict[str, Tool]:
        source, dot, inner = name.partition(".")
        if dot:
            return self._find_in_source(name, source, inner)
        plugins = self._load()
        holders = [f"in the entry point {plugin}" for plugin in plugins.holders.get(name, ())]
        if name in self._built_in:
            holders.insert(0, "built in")
        if len(holders) > 1:
            raise ToolNameError(f"there are several tools {name!r}: {', '.join(holders)}")
        if not holders:
            raise self._unknown(name)
        return {name: self._built_in.get(name) or plugins.tools[name]}

    def _find_in_source(self, name: str, source: str, inner: str) -> dict[str, Tool]:
        if source not in self._sources:
            raise UnknownToolError(name, self.names(), f"; there is no source {source[:100]!r}")
        tools = self._tools_of(source)
        if inner == "*":
            shown = {f"{source}.{known}": self._shown(source, known, tools[known]) for known in sorted(tools)}
            return {known: part for known, part in shown.items() if isinstance(part, _SourceTool)}
        if inner not in tools:
            hint = "" if tools else f"; {source} has listed no tools yet: the server's log says why"
            raise UnknownToolError(name, [f"{source}.{known}" for known in sorted(tools)], hint)
        part = self._shown(source, inner, tools[inner])
        if isinstance(part, str):
            raise ToolNameError(f"the tool {name} cannot be used: {part}")
        return {name: part}

    def _shown(self, source: str, name: str, inner: Tool) -> _SourceTool | str:
        """The tool as the model sees it, made once, or why it cannot be used."""
        made = self._made.get((source, name))
        if made is None or made[0] is not inner:
            try:
                made = (inner, _SourceTool(inner, shown_name(source, name)))
            except ValueError as problem:
                _logger.warning("tool %s.%s is left out: %s", source, name, problem)
                made = (inner, str(problem))
            self._made[source, name] = made
        return made[1]

    def _tools_of(self, source: str) -> Mapping[str, Tool]:
        return self._sources[source].tools()

    def _load(self) -> _LoadedPlugins:
        if self._loaded is None:
            self._loaded = _LoadedPlugins(self._plugins())
        return self._loaded

    def _unknown(self, name: str) -> UnknownToolError:
        broken = self._load().broken
        if not broken:
            return UnknownToolError(name, self.names())
        reasons = "; ".join(f"{plugin}: {why}" for plugin, why in broken.items())
        return ToolPluginError(name, self.names(), f"; of the group {ENTRY_POINT_GROUP}, not loaded: {reasons}")


class _LoadedPlugins:
    """What the entry points gave: tools by name, who has which, and why the others gave none."""

    def __init__(self, plugins: Iterable[EntryPoint]) -> None:
        self.tools: dict[str, Tool] = {}
        self.holders: dict[str, list[str]] = {}
        self.broken: dict[str, str] = {}
        for plugin in plugins:
            place = f"{plugin.name} = {plugin.value}"
            try:
                tools = list(tools_of(plugin.load()))
            except (Exception, SystemExit) as failure:  # noqa: BLE001 - somebody else's code: any import can fail
                self.broken[place] = f"{type(failure).__name__}: {failure}"[:500]
                continue
            for loaded in tools:
                self.tools[loaded.spec.name] = loaded
                self.holders.setdefault(loaded.spec.name, []).append(place)


def tools_of(thing: Any) -> Iterable[Tool]:
    """The tools that an entry point stands for: a function, a tool, or several of them.

    Raises:
        TypeError: it is something else, or a function that cannot be a tool.
        ValueError: a tool's name or schema cannot be used.
    """
    if isinstance(thing, Iterable) and not isinstance(thing, str | bytes | Mapping):
        return [found for part in thing for found in tools_of(part)]
    if isinstance(getattr(thing, "spec", None), ToolSpec) and callable(getattr(thing, "call", None)):
        if not _TOOL_NAME.fullmatch(thing.spec.name):
            raise ValueError(f"{thing.spec.name!r} is not a name that vendors take for a tool")
        digestible(thing.spec.parameters)
        return [thing]
    return [tool()(thing)]


def shown_name(source: str, name: str) -> str:
    """What the model calls a source's tool: ``files_read`` for ``read`` of ``files``.

    Other characters than letters, digits, _ and - become _; a name that was changed, or is too long, gets a digest of
    the whole at its end, so that it stays unique.
    """
    whole = f"{source}_{name}"
    shown = re.sub(r"[^A-Za-z0-9_-]", "_", whole)
    if shown == whole and len(shown) <= MAX_NAME_CHARS:
        return shown
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{shown[: MAX_NAME_CHARS - 9]}_{digest}"


class _SourceTool:
    """A source's tool under the name, and with the schema, that vendors take."""

    def __init__(self, inner: Tool, name: str) -> None:
        self._inner = inner
        description = inner.spec.description or name.replace("_", " ")  # Gemini asks for one
        self._spec = ToolSpec(name, description, digestible(inner.spec.parameters))

    @property
    def spec(self) -> ToolSpec:
        return self._spec

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        return await self._inner.call(arguments, context)
