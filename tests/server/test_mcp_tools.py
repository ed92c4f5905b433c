"""MCP servers as tool sources, with real processes on the real clock: what waits is woken, nothing sleeps."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from mcp import MCPError
from mcp.client._memory import InMemoryTransport
from mcp.server.mcpserver import MCPServer
from mcp_types import (
    INTERNAL_ERROR,
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ResourceLink,
)

from engine.memory import Owner
from engine.tools import ToolContext, ToolResult
from server import mcp_tools
from server.mcp_connection import Hold
from server.mcp_process import MAX_LINE_BYTES, LastWords, LineSplitter, LineTooLongError
from server.mcp_results import tool_result
from server.mcp_tools import McpConfigError, McpServer, McpServerConfig, McpServers
from server.tool_registry import ToolRegistry, UnknownToolError

EXAMPLE = str(Path(__file__).with_name("mcp_example.py"))
OLD = str(Path(__file__).with_name("mcp_old_example.py"))
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/", "LANG": "C.UTF-8", "OPENAI_API_KEY": "secret", "WANTED": "yes"}
GONE = ToolResult("the tool server 'ex' has gone; it is being restarted", failed=True)

CONTEXT = ToolContext(
    run_id="r", call_id="c", agent_id="a", owner=Owner(), memory=None, memory_updated=lambda key, operation: None
)


def example(*arguments: str, **options: Any) -> McpServerConfig:
    return McpServerConfig(name="ex", command=sys.executable, args=(EXAMPLE, *arguments), **options)


async def start(
    nursery: trio.Nursery, config: McpServerConfig, environment: Mapping[str, str] = ENVIRONMENT
) -> McpServer:
    servers = McpServers([config], environment)
    await nursery.start(servers.run)
    return servers.by_name["ex"]


async def call(server: McpServer, tool: str, /, **arguments: Any) -> ToolResult:
    return await server.tools()[tool].call(msgspec.json.encode(arguments).decode(), CONTEXT)


def pipe(folder: Path, name: str) -> str:
    path = folder / name
    os.mkfifo(path)
    return str(path)


async def told(path: str) -> None:
    """Until the server writes into the pipe."""
    assert await trio.to_thread.run_sync(Path(path).read_text, abandon_on_cancel=True) == "x"


async def wait_dead(pid: int) -> None:
    """Until a process that is no child of ours has ended; at once if it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


def is_dead(pid: int) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    finally:
        os.close(descriptor)


async def test_tools_are_called_and_bad_calls_are_failed_results(nursery: trio.Nursery) -> None:
    server = await start(nursery, example())
    assert (server.state, server.fault) == ("up", None)
    add = server.tools()["add"].spec
    assert (add.name, add.description) == ("add", "Add two numbers.")
    assert add.parameters["properties"]["a"]["type"] == "integer"
    assert await call(server, "add", a=1, b=2) == ToolResult({"result": 3})
    assert await call(server, "echo", text="日本\n語") == ToolResult("日本\n語")
    bad = await call(server, "add", a="x", b=2)
    assert bad.failed
    assert "valid integer" in bad.value
    failed = await call(server, "fail", reason="a secret")
    assert failed == ToolResult("Error executing tool fail", failed=True)
    no_json = await server.tools()["echo"].call("[1]", CONTEXT)
    assert no_json.failed
    assert no_json.value.startswith("the arguments are no JSON object")
    assert await server.call("nothing", {}) == ToolResult("Unknown tool: nothing", failed=True)
    assert await call(server, "show") == ToolResult(
        "look:\n[image of type image/png, about 300 bytes; not shown]\n"
        "[link to the resource file:///a.txt, text/plain, 12 bytes]\ninside b"
    )


async def test_a_crash_is_a_failed_result_and_the_server_comes_back(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    server = await start(nursery, example())
    crash = server.tools()["crash"]
    started, go = pipe(tmp_path, "started"), pipe(tmp_path, "go")
    other: list[ToolResult] = []

    async def call_other() -> None:
        other.append(await call(server, "wait_for", started=started, go=go))

    async with trio.open_nursery() as calls:
        calls.start_soon(call_other)
        await told(started)
        assert await crash.call("", CONTEXT) == GONE  # perhaps before its process is seen to have ended
        before = trio.current_time()
        assert await call(server, "add", a=1, b=2) == GONE
        assert trio.current_time() - before < 0.1
    assert other == [GONE]
    await server.wait_up()
    assert await call(server, "add", a=1, b=2) == ToolResult({"result": 3})
    assert await crash.call("", CONTEXT) == GONE  # the tool of before is the tool of now
    assert "tool server ex: about to crash" in caplog.messages
    assert (
        "tool server ex is down: it has ended (exit code 3; its last lines: about to crash); next start in 0.5 s"
        in caplog.messages
    )


async def test_a_call_cancelled_is_cancelled_at_the_server_and_disturbs_no_other(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start(nursery, example())
    pipes = {name: pipe(tmp_path, name) for name in ("first", "cancelled", "second", "go")}
    results: list[ToolResult] = []

    async def call_other() -> None:
        results.append(await call(server, "wait_for", started=pipes["second"], go=pipes["go"]))

    async with trio.open_nursery() as calls:
        calls.start_soon(call_other)
        await told(pipes["second"])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as doomed:
                doomed.start_soon(
                    partial(call, server, "wait_cancelled", started=pipes["first"], cancelled=pipes["cancelled"])
                )
                await told(pipes["first"])
                scope.cancel()
        assert scope.cancelled_caught
        await told(pipes["cancelled"])
        await trio.to_thread.run_sync(Path(pipes["go"]).write_text, "done")
    assert results == [ToolResult("done")]
    assert server.state == "up"


async def test_a_run_leaves_a_server_that_reads_no_more_at_once(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await start(nursery, example())
    started = pipe(tmp_path, "started")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as calls:
            calls.start_soon(partial(call, server, "block", started=started))
            await told(started)
            calls.start_soon(partial(call, server, "echo", text="x" * 2_000_000))
            await trio.testing.wait_all_tasks_blocked()
            before = trio.current_time()
            scope.cancel()
    assert trio.current_time() - before < 0.5


async def test_a_process_gets_only_what_it_is_to_get(nursery: trio.Nursery) -> None:
    server = await start(nursery, example(env=("WANTED", "MISSING")))
    names = (await call(server, "environment")).value.split()
    assert set(names) - {"LC_CTYPE"} == {"PATH", "HOME", "LANG", "WANTED"}


async def test_tools_that_come_later_are_found(nursery: trio.Nursery) -> None:
    server = await start(nursery, example())
    registry = ToolRegistry({"ex": server}, plugins=lambda: ())
    with pytest.raises(UnknownToolError):
        registry.find(["ex.again"])
    listed = trio.Event()
    server.on_listed = listed.set
    assert await call(server, "learn", name="again") == ToolResult("learnt")
    await listed.wait()
    (again,) = registry.find(["ex.again"])
    assert again.spec.name == "ex_again"
    assert await again.call('{"text": "hi"}', CONTEXT) == ToolResult("hi")


async def test_a_server_of_old_is_understood_at_the_second_try(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(nursery, McpServerConfig(name="ex", command=sys.executable, args=(OLD,), start_seconds=1))
    assert list(server.tools()) == []
    await server.wait_up()
    assert caplog.messages == ["tool server ex is down: it was not ready within 1 s; next start in 0.5 s"]
    assert list(server.tools()) == ["first", "second"]
    listed = trio.Event()
    server.on_listed = listed.set
    assert await call(server, "first") == ToolResult("first")
    await listed.wait()
    assert list(server.tools()) == ["first", "second", "more2"]


async def test_a_server_that_cannot_start_keeps_nobody_from_starting(nursery: trio.Nursery) -> None:
    config = McpServerConfig(name="ex", command="no-such-command-anywhere")
    server = await start(nursery, config)
    assert server.state == "down"
    assert "no-such-command-anywhere" in (server.fault or "")
    assert dict(server.tools()) == {}
    assert await server.call("add", {}) == ToolResult(
        "the tool server 'ex' could not be started; it is tried again", failed=True
    )
    with pytest.raises(UnknownToolError, match=r"there is no tool 'ex\.add'"):
        ToolRegistry({"ex": server}, plugins=lambda: ()).find(["ex.add"])


async def test_why_a_program_ended_is_said(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    script = "import sys; print('hello', file=sys.stderr); sys.exit('fatal: no token')"
    server = await start(nursery, McpServerConfig(name="ex", command=sys.executable, args=("-c", script)))
    assert server.fault is not None
    assert server.fault.endswith(" (exit code 1; its last lines: hello | fatal: no token)")
    assert "tool server ex: fatal: no token" in caplog.messages
    assert f"tool server ex is down: {server.fault}; next start in 0.5 s" in caplog.messages


async def test_a_server_that_comes_back_is_said_to(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = await start(nursery, example())
    tools = len(server.tools())
    assert await call(server, "crash") == GONE
    await server.wait_up()
    told = [line for line in caplog.messages if " is up" in line or " is down" in line]
    assert told[0] == f"tool server ex is up with {tools} tools"
    assert "(exit code 3; its last lines: about to crash)" in told[1]
    assert told[2] == f"tool server ex is up again with {tools} tools"


def test_last_words_are_few_short_and_printable() -> None:
    words = LastWords()
    assert str(words) == ""
    for number in range(20):
        words.hear(f"{number}\x1b[31m{'x' * 1000}")
    words.exit_code = -9
    said = str(words)
    assert said.startswith("ended by signal 9; its last lines: 15 [31mx")
    assert said.isprintable()
    assert len(said) < 1100


async def test_a_mute_server_costs_its_start_seconds(nursery: trio.Nursery) -> None:
    before = trio.current_time()
    server = await start(nursery, example("mute", "stubborn", start_seconds=0.5))
    assert 0.5 <= trio.current_time() - before < 2  # though to end it takes 2 s more
    assert (await server.call("add", {})).failed


async def test_delays_double_until_a_server_holds(monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
    server = McpServer(example(), ENVIRONMENT)
    starts: list[float] = []
    up_for = [0.0] * 9 + [59, 60, 0, 0]

    async def attempt() -> None:
        starts.append(trio.current_time())
        if len(starts) > len(up_for):
            nursery.cancel_scope.cancel()
        server._up_since = trio.current_time()  # as ``_listed`` does
        await trio.sleep(up_for[len(starts) - 1] if len(starts) <= len(up_for) else 0)
        raise ExceptionGroup("of tasks", [OSError("broken")])

    monkeypatch.setattr(server, "_attempt", attempt)
    async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - what ``attempt`` cancels
        nursery.start_soon(server.run)
    pauses = [after - before - up for before, after, up in zip(starts, starts[1:], up_for, strict=False)]
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 0.5, 1, 2])
    assert server.fault == "broken"


async def test_a_server_that_is_up_has_all_the_time_in_the_world(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, autojump_clock: Any
) -> None:
    here = MCPServer("here")

    @here.tool()
    async def slow() -> str:
        await trio.sleep(3600)
        return "at last"

    async def connect(hold: Hold) -> None:
        await hold(InMemoryTransport(here), trio.Event())

    server = McpServer(example(start_seconds=1), {})
    monkeypatch.setattr(server, "_connect", connect)
    nursery.start_soon(server.run)
    await server.wait_up()
    assert await call(server, "slow") == ToolResult({"result": "at last"})
    assert server.state == "up"


async def test_an_error_of_a_server_that_is_still_there_is_its_own(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, autojump_clock: Any
) -> None:
    here = MCPServer("here")

    @here.tool()
    async def doubtful() -> str:
        raise MCPError(INTERNAL_ERROR, "the disk is full")

    async def connect(hold: Hold) -> None:
        await hold(InMemoryTransport(here), trio.Event())

    server = McpServer(example(), {})
    monkeypatch.setattr(server, "_connect", connect)
    nursery.start_soon(server.run)
    await server.wait_up()
    await trio.testing.wait_all_tasks_blocked()
    listed = trio.Event()
    server.on_listed = listed.set
    assert await call(server, "doubtful") == ToolResult("the disk is full", failed=True)
    await listed.wait()  # it was asked whether it is still there
    assert server.state == "up"


def test_results_are_told_as_text() -> None:
    blob = BlobResourceContents(uri="file:///c", blob="A" * 400, mime_type="application/pdf")
    content: list[ContentBlock] = [
        EmbeddedResource(resource=blob),
        AudioContent(data="A" * 40, mime_type="audio/wav"),
        ResourceLink(name="d", uri="file:///d"),
    ]
    assert tool_result(CallToolResult(content=content)) == ToolResult(
        "[resource file:///c of type application/pdf, about 300 bytes; not shown]\n"
        "[audio of type audio/wav, about 30 bytes; not shown]\n[link to the resource file:///d, of unknown type]"
    )
    assert tool_result(CallToolResult(content=[], structured_content={"a": None})) == ToolResult({"a": None})
    assert tool_result(CallToolResult(content=[], structured_content={"a": 1}, is_error=True)) == ToolResult(
        "the tool failed and did not say why", failed=True
    )


async def test_all_processes_are_gone_at_the_end(tmp_path: Path) -> None:
    pids: list[int] = []
    async with trio.open_nursery() as nursery:
        server = await start(nursery, example("stubborn"))
        pids += [int(pid) for pid in (await call(server, "process")).value.split()]
        nursery.cancel_scope.cancel()
        before = trio.current_time()
    assert trio.current_time() - before < 3
    with pytest.raises(ProcessLookupError):  # no zombie either
        os.kill(pids[0], 0)
    with trio.fail_after(5):
        await wait_dead(pids[1])


async def test_a_crashed_process_leaves_no_child_behind(nursery: trio.Nursery) -> None:
    server = await start(nursery, example())
    leader, child = (await call(server, "process")).value.split()
    assert not is_dead(int(child))
    os.kill(int(leader), signal.SIGKILL)
    with trio.fail_after(5):
        await wait_dead(int(child))
    assert await call(server, "add", a=1, b=2) in (GONE, ToolResult({"result": 3}))


async def test_what_a_server_writes_elsewhere_is_logged_in_bounds(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    server = await start(nursery, example("noisy"))
    assert await call(server, "add", a=1, b=2) == ToolResult({"result": 3})
    lines = [line for line in caplog.messages if line.startswith("tool server ex: line")]
    assert len(lines) == 100
    assert max(map(len, lines)) < 600
    assert "tool server ex: hello, I am no message" in caplog.messages
    assert capfd.readouterr() == ("", "")


def test_a_line_has_an_end_or_a_limit() -> None:
    lines = LineSplitter()
    assert lines.feed(b"on") == []
    assert lines.feed(b"e\ntwo\n\nth") == [b"one", b"two", b""]
    assert lines.feed(b"ree\n") == [b"three"]
    with pytest.raises(LineTooLongError, match="16 MiB"):
        lines.feed(b"x" * (MAX_LINE_BYTES + 1))


class HttpExample:
    """The example over HTTP, as a process that can be ended and started again on its port."""

    def __init__(self, token: str) -> None:
        self._environment = ENVIRONMENT | {"TOKEN": token}
        self.port = 0

    async def start(self, nursery: trio.Nursery) -> trio.Process:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, EXAMPLE, "http", str(self.port)],
                stdout=subprocess.PIPE,
                env=self._environment,
                check=False,
            )
        )
        assert process.stdout is not None
        self.port = int(await process.stdout.receive_some())
        return process


async def test_a_server_over_http_is_called_lost_and_found_again(nursery: trio.Nursery, tmp_path: Path) -> None:
    http = HttpExample("t0ken")
    process = await http.start(nursery)
    config = McpServerConfig(
        name="ex", url=f"http://127.0.0.1:{http.port}/mcp", headers_env={"Authorization": "HEADER"}, start_seconds=5
    )
    server = await start(nursery, config, {"HEADER": "Bearer t0ken"})
    assert await call(server, "add", a=1, b=2) == ToolResult({"result": 3})
    pipes = {name: pipe(tmp_path, name) for name in ("first", "cancelled")}
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as doomed:
            doomed.start_soon(
                partial(call, server, "wait_cancelled", started=pipes["first"], cancelled=pipes["cancelled"])
            )
            await told(pipes["first"])
            scope.cancel()
    await told(pipes["cancelled"])
    assert await call(server, "echo", text="still there") == ToolResult("still there")
    process.kill()
    await process.wait()
    assert await call(server, "add", a=1, b=2) == GONE
    assert server.state == "down"
    process = await http.start(nursery)
    await server.wait_up()
    assert await call(server, "add", a=1, b=2) == ToolResult({"result": 3})


async def test_a_server_over_http_that_refuses_us_is_down(nursery: trio.Nursery) -> None:
    http = HttpExample("t0ken")
    await http.start(nursery)
    config = McpServerConfig(name="ex", url=f"http://127.0.0.1:{http.port}/mcp", start_seconds=5)
    server = await start(nursery, config, {})
    assert (server.state, server.fault) == ("down", "Server returned an error response")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "a.b", "command": "x"}, "no name for an MCP server"),
        ({"name": "a"}, "either a command or a url"),
        ({"name": "a", "command": "x", "url": "http://h"}, "either a command or a url"),
        ({"name": "a", "url": "http://h", "args": ["x"]}, "go with a command"),
        ({"name": "a", "command": "x", "headers_env": {"A": "B"}}, "goes with a url"),
        ({"name": "a", "url": "file:///etc/passwd"}, "begins with http"),
        ({"name": "a", "url": "http://[::1"}, "begins with http"),
        ({"name": "a", "command": "x", "start_seconds": 0}, "a number above 0"),
        ({"name": "a", "command": "x", "environment": {"KEY": "secret"}}, "unknown field"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(fields, McpServerConfig)


def test_servers_that_cannot_be_used_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(McpConfigError, match="declared twice"):
        McpServers([example(), example()], {})
    remote = McpServerConfig(name="ex", url="http://h", headers_env={"Authorization": "TOKEN"})
    with pytest.raises(McpConfigError, match="variable TOKEN is not set"):
        McpServers([remote], {"TOKEN": ""})
    monkeypatch.setattr(mcp_tools, "find_spec", lambda name: None)
    with pytest.raises(McpConfigError, match=r"lumos-stream\[mcp\]"):
        McpServers([example()], {})
    McpServers([], {})
