"""MCP servers as sources of tools: each has a task that starts it, and starts it again when it has gone."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec
import trio

from engine.provider import ToolSpec
from engine.tools import Tool, ToolContext, ToolResult

from .mcp_process import Command, LastWords, passed_environment

if TYPE_CHECKING:
    from mcp_types import Tool as ListedTool

    from .mcp_connection import Handshake, Hold, Session

FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""A server that has been up for so long is started again with the first delay."""

ServerState: TypeAlias = Literal["starting", "up", "down"]

_SERVER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")

_logger = logging.getLogger(__name__)


class McpConfigError(ValueError):
    """The servers' configuration cannot be used; the text names the server and the reason."""


class McpServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach an MCP server: a command to start, or a URL.

    Attributes:
        name: comes before a dot in the names of its tools: up to 32 letters, digits, ``_`` and ``-``.
        command, args, cwd: the process to start, which speaks over its standard input and output.
        env: the environment variables of ours that the process gets, beside PATH, HOME and LANG. Names, not values.
        url: the endpoint of a server elsewhere (streamable HTTP).
        headers_env: headers for it, each with the environment variable that holds its value.
        start_seconds: to be started, shake hands and list its tools.
    """

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str | None = None
    url: str | None = None
    headers_env: dict[str, str] = {}
    start_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not _SERVER_NAME.fullmatch(self.name):
            raise ValueError(
                f"{self.name!r} is no name for an MCP server: up to 32 letters, digits, _ and -, "
                "beginning with a letter or _"
            )
        if (self.command is None) == (self.url is None):
            raise ValueError(f"MCP server {self.name!r}: give either a command or a url")
        if self.command is None and (self.args or self.env or self.cwd is not None):
            raise ValueError(f"MCP server {self.name!r}: args, env and cwd go with a command")
        if self.url is None and self.headers_env:
            raise ValueError(f"MCP server {self.name!r}: headers_env goes with a url")
        if self.url is not None and not _usable_url(self.url):
            raise ValueError(f"MCP server {self.name!r}: the url begins with http:// or https:// and names a host")
        if not (isfinite(self.start_seconds) and self.start_seconds > 0):
            raise ValueError(f"MCP server {self.name!r}: start_seconds is a number above 0")


def _usable_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


class McpTool:
    """A tool of an MCP server, as long as Lumos runs: also while its server is down, and after it came back."""

    def __init__(self, server: McpServer, listed: ListedTool) -> None:
        self._server = server
        self.spec = ToolSpec(listed.name, listed.description or "", listed.input_schema)

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:  # noqa: ARG002 - it learns nothing of the run
        """Call it; what goes wrong is a failed result."""
        try:
            values = msgspec.json.decode(arguments.strip() or "{}", type=dict[str, Any])
        except msgspec.DecodeError as error:
            return ToolResult(f"the arguments are no JSON object: {error}", failed=True)
        return await self._server.call(self.spec.name, values)


class McpServer:
    """One MCP server. ``run`` it in a task; what it offers and whether it is up can be asked at any time.

    Attributes:
        state: ``down`` means that it is started again after a delay.
        fault: why it is down, for the operator; None while it is up.
        tried: its first start has succeeded or failed.
        on_listed: called when its tools have been listed, again after each change. Synchronous.
    """

    def __init__(self, config: McpServerConfig, environment: Mapping[str, str]) -> None:
        self.name = config.name
        self.state: ServerState = "starting"
        self.fault: str | None = None
        self.tried = trio.Event()
        self.on_listed: Callable[[], None] = lambda: None
        self._config = config
        self._environment = environment
        self._tools: dict[str, McpTool] = {}
        self._session: Session | None = None
        self._up = trio.Event()
        self._handshake: Handshake = "auto"
        self._was_up = False
        self._told_down = False
        self._up_since = inf
        self._last_words = LastWords()

    @property
    def start_seconds(self) -> float:
        """What it gets to be ready."""
        return self._config.start_seconds

    async def wait_up(self) -> None:
        """Until it is up; at once if it is."""
        await self._up.wait()

    def tools(self) -> Mapping[str, Tool]:
        """Its tools by their own names; while it is down, those it had. Empty before its first start."""
        return dict(self._tools)

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Call one of its tools; a failed result at once if it is not up, and as soon as it goes if it goes."""
        if self._session is None:
            return self._gone(was_up=self._was_up)
        return await self._session.call(name, arguments)

    async def run(self) -> None:
        """Start it, and start it again whenever it has gone, until cancelled. Its process is gone then."""
        delay = FIRST_DELAY_SECONDS
        while True:
            self._up_since = inf
            self._last_words = LastWords()
            fault = "it has ended"
            try:
                await self._attempt()
            except* Exception as errors:
                fault = _reason(errors)
                _logger.debug("tool server %s", self.name, exc_info=errors)
            if said := str(self._last_words):
                fault = f"{fault} ({said})"
            self.state, self.fault = "down", fault
            self.tried.set()
            if trio.current_time() - self._up_since >= STEADY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            _logger.warning("tool server %s is down: %s; next start in %g s", self.name, fault, delay)
            self._told_down = True
            await trio.sleep(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    async def _attempt(self) -> None:
        """Start it and serve calls until it ends.

        Raises:
            Exception: it could not be started, or broke; often a group.
        """
        from .mcp_connection import Session  # noqa: PLC0415 - optional

        session = Session(self.name, self._config.start_seconds, self._gone(was_up=True))
        seconds = self._config.start_seconds
        with trio.CancelScope(deadline=trio.current_time() + seconds) as starting:

            def listed(tools: Mapping[str, ListedTool]) -> None:
                starting.deadline = inf
                self._listed(session, tools)

            async def hold(transport: AbstractAsyncContextManager[Any], ended: trio.Event) -> None:
                await session.hold(transport, ended, self._handshake, listed, self._closed)

            await self._connect(hold)
        if starting.cancelled_caught:
            # Some servers of before 2026 never answer a request that they do not know, the newer handshake's.
            self._handshake = "legacy" if self._handshake == "auto" else "auto"
            self._last_words.exit_code = None  # it ended because we closed its input
            raise TimeoutError(f"it was not ready within {seconds:g} s")

    async def _connect(self, hold: Hold) -> None:
        from .mcp_connection import over_http, over_process  # noqa: PLC0415 - optional

        config = self._config
        if config.url is not None:
            headers = {header: self._environment[variable] for header, variable in config.headers_env.items()}
            await over_http(config.url, headers, config.start_seconds, hold)
        elif config.command is not None:
            environment = passed_environment(self._environment, config.env)
            argv = (config.command, *config.args)
            command = Command(name=self.name, argv=argv, environment=environment, cwd=config.cwd)
            await over_process(command, hold, self._last_words)

    def _listed(self, session: Session, tools: Mapping[str, ListedTool]) -> None:
        """The session is open, and these are its tools."""
        self._tools = {name: McpTool(self, tool) for name, tool in tools.items()}
        if self._session is None:
            again = " again" if self._told_down else ""
            self._told_down = False
            _logger.info("tool server %s is up%s with %d tools", self.name, again, len(tools))
            self._session = session
            self._up_since = trio.current_time()
            self._was_up = True
            self.state, self.fault = "up", None
            self._up.set()
            self.tried.set()
        self.on_listed()

    def _closed(self) -> None:
        self._session = None
        self.state, self.fault = "down", "it has gone"
        self._up = trio.Event()

    def _gone(self, *, was_up: bool) -> ToolResult:
        what = "has gone; it is being restarted" if was_up else "could not be started; it is tried again"
        return ToolResult(f"the tool server {self.name!r} {what}", failed=True)


class McpServers:
    """All MCP servers of a Lumos. ``run`` them in a task; all their processes are gone when it has ended.

    Attributes:
        by_name: the servers, each a source of tools.
    """

    def __init__(self, configs: Sequence[McpServerConfig], environment: Mapping[str, str]) -> None:
        """Check the configuration; nothing is started yet.

        Raises:
            McpConfigError: a name is there twice, the variable of a header is not set, or ``mcp`` is not installed.
        """
        if configs and find_spec("mcp") is None:
            raise McpConfigError("MCP servers need the package mcp: pip install 'lumos-stream[mcp]'")
        self.by_name: dict[str, McpServer] = {}
        for config in configs:
            if config.name in self.by_name:
                raise McpConfigError(f"MCP server {config.name!r} is declared twice")
            missing = [variable for variable in config.headers_env.values() if not environment.get(variable)]
            if missing:
                raise McpConfigError(f"MCP server {config.name!r}: the environment variable {missing[0]} is not set")
            for variable in config.env:
                if variable not in environment:
                    _logger.warning("tool server %s: the environment variable %s is not set", config.name, variable)
            self.by_name[config.name] = McpServer(config, environment)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:  # noqa: ASYNC114 - many a run
        """Run them until cancelled. Started once each is up, has failed for the first time or used up its seconds."""
        async with trio.open_nursery() as nursery:
            for server in self.by_name.values():
                nursery.start_soon(server.run)
            started_at = trio.current_time()
            for server in self.by_name.values():
                with trio.move_on_at(started_at + server.start_seconds):
                    await server.tried.wait()
            task_status.started()


def _reason(error: BaseException) -> str:
    """The first thing that went wrong, in a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split())[:500] or type(error).__name__
