"""A session with an MCP server, over a process's pipes or over HTTP, and the calls under way on it.

Imports the optional package ``mcp``, so nobody imports this module but ``mcp_tools``, when there are servers to reach.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any, Literal, TypeAlias

import anyio
import httpx2
import mcp_types as types
import trio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import SubscriptionLost
from mcp.shared.message import SessionMessage
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from engine.tools import ToolResult

from .mcp_process import EXIT_SECONDS, READ_BYTES, Command, LastWords, LineLog, LineSplitter, run_process
from .mcp_results import tool_result

MAX_PAGES = 100
"""Of one listing of tools; a server with more has the rest left out."""

SETTLE_SECONDS = 1.0
"""What calls that were answered before the end of a session get to hear of it."""

LISTEN_AGAIN_SECONDS = 5.0

Handshake: TypeAlias = Literal["auto", "legacy"]
Listed: TypeAlias = Callable[[Mapping[str, types.Tool]], None]
Hold: TypeAlias = Callable[[AbstractAsyncContextManager[Any], trio.Event], Awaitable[None]]

_CLIENT = types.Implementation(name="lumos", version="1")
_DOUBTFUL = {types.CONNECTION_CLOSED, types.INTERNAL_ERROR, types.INVALID_REQUEST}
_CLOSED = "Connection closed"
"""How ``mcp`` names an end of the session. Its code is no sign: servers use the same one for errors of their own."""

_logger = logging.getLogger(__name__)


class _Call:
    """A call under way; ``result`` is what it has come to once ``done``."""

    def __init__(self, name: str, arguments: dict[str, Any], result: ToolResult) -> None:
        self.name = name
        self.arguments = arguments
        self.result = result
        self.scope = trio.CancelScope()
        self.done = trio.Event()


class Session:
    """An open session. Its calls run in its own nursery, so that their callers leave at once when cancelled."""

    def __init__(self, name: str, start_seconds: float, gone: ToolResult) -> None:
        self._name = name
        self._start_seconds = start_seconds
        self._gone = gone
        self._calls: set[_Call] = set()
        self._changed = trio.Event()
        self._client: Client | None = None
        self._nursery: trio.Nursery | None = None

    async def hold(
        self,
        transport: AbstractAsyncContextManager[Any],
        ended: trio.Event,
        handshake: Handshake,
        listed: Listed,
        closed: Callable[[], None],
    ) -> None:
        """Open the session, say which tools there are now and whenever that changes, and serve calls until its end.

        ``closed`` is called before any call hears that the session has gone.

        Raises:
            Exception: the session could not be opened, or broke; often a group.
        """
        client = Client(
            transport, mode=handshake, cache=None, client_info=_CLIENT, message_handler=self._hear_notification
        )
        async with client, trio.open_nursery() as nursery:
            self._client, self._nursery = client, nursery
            listed(await self._list_tools(client))
            nursery.start_soon(self._follow_changes, client, listed)
            nursery.start_soon(self._listen, client)
            try:
                await ended.wait()
                self._close(closed)
                await self._settle()
            finally:
                self._close(closed)
            nursery.cancel_scope.cancel(reason="the session with the tool server has ended")

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Call the tool; a failed result if the session ends meanwhile. Cancelled, it tells the server and returns."""
        if self._nursery is None:
            return self._gone
        call = _Call(name, arguments, self._gone)
        self._nursery.start_soon(self._perform, call)
        try:
            await call.done.wait()
        finally:
            call.scope.cancel(reason="nobody waits for the result")
        return call.result

    def _close(self, closed: Callable[[], None]) -> None:
        if self._nursery is not None:
            self._nursery = None
            closed()

    async def _perform(self, call: _Call) -> None:
        """``mcp`` itself tells the server when the scope is cancelled, for which it takes its time, shielded."""
        self._calls.add(call)
        try:
            with call.scope:
                call.result = await self._ask(call)
        finally:
            self._calls.discard(call)
            call.done.set()

    async def _ask(self, call: _Call) -> ToolResult:
        assert self._client is not None
        try:
            return tool_result(await self._client.call_tool(call.name, call.arguments))
        except MCPError as error:
            if error.message == _CLOSED:
                return self._gone
            if error.code in _DOUBTFUL:
                self._changed.set()  # is the server still there, and does it know us? The listing shows it
            return ToolResult(error.message or f"error {error.code}", failed=True)
        except Exception as error:
            _logger.warning("tool server %s: the answer of %s cannot be used", self._name, call.name, exc_info=True)
            return ToolResult(f"the answer of the tool cannot be used: {error}", failed=True)

    async def _settle(self) -> None:
        deadline = trio.current_time() + SETTLE_SECONDS
        for call in tuple(self._calls):
            with trio.move_on_at(deadline):
                await call.done.wait()

    async def _list_tools(self, client: Client) -> dict[str, types.Tool]:
        tools: dict[str, types.Tool] = {}
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools |= {tool.name: tool for tool in page.tools}
            cursor = page.next_cursor
            if cursor is None:
                return tools
        _logger.warning("tool server %s: its list of tools has more than %d pages", self._name, MAX_PAGES)
        return tools

    async def _follow_changes(self, client: Client, listed: Listed) -> None:
        """List the tools again when they may have changed; a listing that fails ends the session."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            try:
                with trio.fail_after(self._start_seconds):
                    tools = await self._list_tools(client)
            except MCPError:
                if self._nursery is None:  # it has ended, and not by this
                    return
                raise
            listed(tools)

    async def _hear_notification(self, message: object) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self._changed.set()

    async def _listen(self, client: Client) -> None:
        """Ask to be told of changes, as protocols from 2026 on want it; servers before tell unasked."""
        tools = client.server_capabilities.tools
        if client.protocol_version not in MODERN_PROTOCOL_VERSIONS or tools is None or not tools.list_changed:
            return
        while True:
            with suppress(MCPError, SubscriptionLost):
                async with client.listen(tools_list_changed=True) as changes:
                    self._changed.set()  # what changed before is not told
                    async for _ in changes:
                        self._changed.set()
            await trio.sleep(LISTEN_AGAIN_SECONDS)


async def over_process(command: Command, hold: Hold, last_words: LastWords) -> None:
    """Hold a session with a process of ours; return when either ends, and the process is gone then.

    ``last_words`` hear how it ended.
    """

    async def talk(process: trio.Process) -> None:
        to_us, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        outgoing, to_it = anyio.create_memory_object_stream[SessionMessage](0)
        ended = trio.Event()
        with to_us, incoming, outgoing, to_it:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read_messages, process, to_us, ended, LineLog(command.name))
                nursery.start_soon(_write_messages, process, to_it, ended)
                nursery.start_soon(_watch_exit, process, ended)
                await hold(nullcontext((incoming, outgoing)), ended)
                nursery.cancel_scope.cancel(reason="the session with the tool server has ended")

    await run_process(command, talk, last_words)


async def _read_messages(
    process: trio.Process,
    to_us: MemoryObjectSendStream[SessionMessage | Exception],
    ended: trio.Event,
    log: LineLog,
) -> None:
    """Until its output ends. What is no message, such as a forgotten print, is logged."""
    assert process.stdout is not None
    lines = LineSplitter()
    with suppress(trio.BrokenResourceError, anyio.BrokenResourceError):
        while data := await process.stdout.receive_some(READ_BYTES):
            for line in lines.feed(bytes(data)):
                try:
                    message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    log.log(line)
                else:
                    await to_us.send(SessionMessage(message))
    ended.set()
    to_us.close()


async def _write_messages(
    process: trio.Process, to_it: MemoryObjectReceiveStream[SessionMessage], ended: trio.Event
) -> None:
    assert process.stdin is not None
    with suppress(trio.BrokenResourceError), to_it:
        async for message in to_it:
            text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
            await process.stdin.send_all(text.encode() + b"\n")
    ended.set()


async def _watch_exit(process: trio.Process, ended: trio.Event) -> None:
    """Its output may outlive it, in the hands of a child of its own."""
    await process.wait()
    await trio.sleep(EXIT_SECONDS)
    ended.set()


async def over_http(url: str, headers: Mapping[str, str], connect_seconds: float, hold: Hold) -> None:
    """Hold a session with a server elsewhere, streamable HTTP. Its answers take what time the runs give them."""
    async with httpx2.AsyncClient(headers=dict(headers), timeout=httpx2.Timeout(connect_seconds, read=None)) as client:
        await hold(streamable_http_client(url, http_client=client), trio.Event())
