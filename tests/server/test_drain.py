"""Shutdown as a process of its own: nothing holds it, whoever hangs; a second SIGTERM does not even wait."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest
import trio

from engine.events import ToolCallStart
from engine.pieces import ToolCallPiece
from server.compose import CLEANUP_SECONDS, HURRY_SECONDS
from server.serving import ServingLimits
from tests.harness.recordings import step_recording
from tests.server.test_compose import LONG, STEADY, LiveAnswer, Site, assert_ends_with_draining, site

DRAIN = 0.5
MOST = DRAIN + ServingLimits().closing + CLEANUP_SECONDS + 5.0
"""What a shutdown may take, with some seconds for the process itself on a busy machine."""

MCP_EXAMPLE = Path(__file__).parent / "mcp_example.py"

PLUGIN = '''
import time
import trio

def hang_in_a_thread() -> str:
    """Hang, where nothing can be cancelled."""
    time.sleep(3600)
    return ""

async def swallow_cancelled() -> str:
    """Swallow whatever ends it."""
    while True:
        try:
            await trio.sleep_forever()
        except BaseException:
            time.sleep(0.01)

async def hide_behind_a_shield() -> str:
    """Wait where no cancelling reaches."""
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()
    return ""
'''
TOOLS = ("hang_in_a_thread", "swallow_cancelled", "hide_behind_a_shield")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with tools that do not end, installed for the processes that the test starts."""
    folder = tmp_path / "plugins"
    information = folder / "hanging-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "hanging.py").write_text(PLUGIN)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1.0\n")
    names = "\n".join(f"{name} = hanging:{name}" for name in TOOLS)
    (information / "entry_points.txt").write_text(f"[lumos.tools]\n{names}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def agent_with(*tools: str, url: str = "BASE") -> str:
    named = ", ".join(f'"{name}"' for name in tools)
    return f"""
        [[agent]]
        id = "other"
        tools = [{named}]
        [agent.llm_config]
        provider = "openai_compatible"
        model = "m"
        base_url = "{url}/v1"
        [agent.deadlines]
        total = 90
        connect = 80
        first_token = 80
        tool = 80
        """


@asynccontextmanager
async def ends_in_time(lumos: Site, seconds: float = MOST, signals: int = 1) -> AsyncIterator[None]:
    """Send SIGTERM, run the block, and expect the process to end with 0 within so many seconds."""
    started = trio.current_time()
    for _ in range(signals):
        lumos.serve.process.send_signal(signal.SIGTERM)
        await lumos.serve.wait_line("server.draining")
    yield
    with trio.fail_after(LONG):
        assert await lumos.serve.wait_exit() == 0
    assert trio.current_time() - started < seconds
    assert "Traceback" not in lumos.serve.output


async def read_tool_call(answer: LiveAnswer) -> None:
    with trio.fail_after(LONG):  # noqa: ASYNC912 - may be there already
        while not any(isinstance(event, ToolCallStart) for event in answer.events):
            assert await answer.read_some()


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("signals", [1, 2], ids=["SIGTERM", "SIGTERM twice"])
@pytest.mark.parametrize("name", TOOLS)
async def test_a_tool_that_does_not_end_holds_nothing(name: str, signals: int, tmp_path: Path) -> None:
    calls = step_recording(ToolCallPiece(0, "c1", name, "{}"), first=0.1, last=0.1)
    drain = DRAIN if signals == 1 else 60
    most = MOST if signals == 1 else HURRY_SECONDS + 3.0
    async with (
        site(tmp_path, "--drain", str(drain), recording=calls, agents=agent_with(*TOOLS)) as lumos,
        lumos.open_chat("other") as answer,
    ):
        await read_tool_call(answer)
        async with ends_in_time(lumos, most, signals):
            await assert_ends_with_draining(answer)


async def test_a_model_that_does_not_answer_holds_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        agent = agent_with(url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        async with (
            site(tmp_path, "--drain", str(DRAIN), agents=agent) as lumos,
            lumos.open_chat("other") as answer,
        ):
            await answer.read_some()
            async with ends_in_time(lumos):
                await assert_ends_with_draining(answer)


async def test_a_client_that_does_not_read_holds_nothing(tmp_path: Path) -> None:
    large = step_recording(text="x" * 4_000_000, first=0.1, last=0.2)
    async with site(tmp_path, "--drain", str(DRAIN), recording=large) as lumos:
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", httpx.URL(lumos.url).port))
            body = b'{"message":"hi"}'
            stalled.sendall(
                b"POST /api/v1/agents/local/chat/lumosai/stream HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            await lumos.serve.wait_line("run.ended")
            async with ends_in_time(lumos):
                pass


async def test_an_mcp_server_that_ignores_sigterm_holds_nothing_and_is_gone(tmp_path: Path) -> None:
    server = f"""
        [[mcp_server]]
        name = "example"
        command = "{sys.executable}"
        args = ["{MCP_EXAMPLE}", "stubborn"]
        """
    async with site(tmp_path, "--drain", str(DRAIN), recording=STEADY, agents=server) as lumos:
        (child,) = children_of(lumos.serve.process.pid)
        async with lumos.open_chat() as answer:
            await answer.read_text()
            async with ends_in_time(lumos):
                await assert_ends_with_draining(answer)
        assert not is_alive(child)


def children_of(pid: int) -> list[int]:
    """A thread of it may have started them."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


async def test_a_locked_database_holds_nothing(tmp_path: Path) -> None:
    async with site(tmp_path, "--drain", str(DRAIN), recording=STEADY) as lumos, lumos.open_chat() as answer:
        await answer.read_text()
        with closing(sqlite3.connect(tmp_path / "lumos.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            async with ends_in_time(lumos, LONG):
                await assert_ends_with_draining(answer)


async def test_a_start_that_waits_in_the_queue_is_refused_at_once_while_the_run_before_it_goes_on(
    tmp_path: Path,
) -> None:
    options = ("--max-runs", "1", "--queue-seconds", "60", "--drain", "60")
    async with site(tmp_path, *options, recording=STEADY) as lumos, trio.open_nursery() as nursery:
        refused: list[httpx.Response] = []
        answered = trio.Event()

        async def ask() -> None:
            url = f"{lumos.url}/api/v1/agents/local/chat/lumosai/stream"
            refused.append(await lumos.client.post(url, json={"message": "hi"}))
            answered.set()

        async with lumos.open_chat() as answer:
            await answer.read_text()
            nursery.start_soon(ask)
            with trio.fail_after(LONG):
                while not (await lumos.client.get(f"{lumos.url}/health/ready")).json()["queued_runs"]:  # noqa: ASYNC110
                    pass
            async with ends_in_time(lumos, LONG):
                with trio.fail_after(LONG):
                    await answered.wait()
                assert "run.ended" not in lumos.serve.output
                lumos.serve.process.send_signal(signal.SIGTERM)
                await assert_ends_with_draining(answer)
        assert [(each.status_code, each.headers["Retry-After"]) for each in refused] == [(503, "5")]
