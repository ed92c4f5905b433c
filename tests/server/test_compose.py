"""``lumos serve`` as a process of its own, on real sockets and the real clock: start, log, drain, signals, limits."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from engine import Error, Event, GenerationComplete, TextDelta
from providers.http import open_client
from providers.recording import Recording
from providers.sse import SSEParser
from server.compose import base_url
from server.serving import serve
from server.sockets import listen_tcp
from tests.harness.recordings import steady_recording
from tests.harness.vendor import VendorServer
from tests.server.commands import agent_at, write_agents

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0"]
SECRET = "sk-this-is-a-secret-0123456789"
LONG = 40.0
"""Seconds after which a test gives up; what it waits for takes a fraction of one."""

decode_event = msgspec.json.Decoder(Event).decode


class ServeProcess:
    """A running ``lumos serve``: its URL, and each log line as it comes."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.output = ""
        self._grown = trio.Event()
        self._collecting = trio.CancelScope()

    async def collect_output(self) -> None:
        """Gather standard error to its end."""
        assert self.process.stderr is not None
        with self._collecting:
            async for data in self.process.stderr:
                self.output += data.decode()
                self._grown.set()
                self._grown = trio.Event()
        await self.process.stderr.aclose()

    def refuse_output(self) -> None:
        """Close the pipe that the process logs into."""
        self._collecting.cancel()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The whole log lines so far."""
        return [msgspec.json.decode(line) for line in self.output.splitlines(keepends=True) if line.endswith("\n")]

    async def wait_line(self, event: str) -> dict[str, Any]:
        """The first log line of that event, once it is there."""
        with trio.fail_after(LONG):  # noqa: ASYNC912 - may be there already
            while not (found := [line for line in self.lines if line["event"] == event]):
                await self._grown.wait()
        return found[0]

    async def wait_exit(self) -> int:
        """The exit code."""
        with trio.fail_after(LONG):
            return await self.process.wait()


class Site:
    """A model server on a socket, a ``lumos serve`` whose agent ``local`` asks it, and a client."""

    def __init__(self, serve_process: ServeProcess, vendor: VendorServer, client: httpx.AsyncClient, url: str) -> None:
        self.serve = serve_process
        self.vendor = vendor
        self.client = client
        self.url = url

    @asynccontextmanager
    async def open_chat(self, agent: str = "local") -> AsyncIterator[LiveAnswer]:
        """Start streaming an answer."""
        url = f"{self.url}/api/v1/agents/{agent}/chat/lumosai/stream"
        async with self.client.stream("POST", url, json={"message": "the prompt"}) as response:
            assert response.status_code == 200
            yield LiveAnswer(response)

    async def status(self, path: str) -> int:
        """What a GET answers."""
        return (await self.client.get(self.url + path)).status_code


class LiveAnswer:
    """A streamed answer; ``events`` is what has come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[Event] = []
        self._parser = SSEParser()

    async def read_some(self) -> bool:
        """Read once; whether there was anything."""
        chunk = await self.response.extensions["body"].receive()
        self.events += [decode_event(frame.data) for frame in self._parser.feed(chunk)]
        return bool(chunk)

    async def read_text(self) -> None:
        """Read until the model has said something."""
        with trio.fail_after(LONG):  # noqa: ASYNC912 - may be there already
            while not any(isinstance(event, TextDelta) for event in self.events):
                assert await self.read_some()

    async def read_to_end(self) -> Event:
        """Read to the end of the body, which must be a clean one; the last event."""
        with trio.fail_after(LONG):
            while await self.read_some():
                pass
        return self.events[-1]


QUICK = steady_recording(first=0.1, gap=0.05, last=0.5)
STEADY = steady_recording(first=0.1, gap=0.05, last=60.0)


@asynccontextmanager
async def site(
    directory: Path, *options: str, recording: Recording = QUICK, further: Sequence[Recording] = (), agents: str = ""
) -> AsyncIterator[Site]:
    """Start everything; the process is killed after the block if it still runs.

    ``agents`` is more of the agents file, in which ``BASE`` is the model server's URL.
    """
    vendor = VendorServer(recording, further)
    listeners = listen_tcp("127.0.0.1", 0)
    agent = agent_at(base_url(listeners[0])) + '\napi_key_env = "TEST_KEY"\n[agent.deadlines]\ntotal = 90\n'
    agent += agents.replace("BASE", base_url(listeners[0]))
    arguments = [*COMMAND, "--agents", str(write_agents(directory, agent)), *options]
    database = f"sqlite:///{directory}/lumos.db"
    environment = os.environ | {"TEST_KEY": SECRET, "no_proxy": "*", "LUMOS_DATABASE_URL": database}
    async with trio.open_nursery() as nursery, open_client() as client:
        await nursery.start(serve, vendor.app(), listeners, trio.Event())
        run: Any = partial(trio.run_process, arguments, stderr=subprocess.PIPE, check=False, cwd=ROOT, env=environment)
        process = await nursery.start(run)
        serving = ServeProcess(process)
        nursery.start_soon(serving.collect_output)
        started = await serving.wait_line("server.started")
        yield Site(serving, vendor, client, started["url"])
        nursery.cancel_scope.cancel()


# Start and log


async def test_serve_tells_its_url_and_logs_the_turns_of_a_run_as_json(tmp_path: Path) -> None:
    async with site(tmp_path) as lumos:
        assert await lumos.status("/health/ready") == 200
        async with lumos.open_chat() as answer:
            assert isinstance(await answer.read_to_end(), GenerationComplete)
            run_id = answer.response.headers["X-Run-Id"]
        await lumos.serve.wait_line("run.ended")
        started, *turns = lumos.serve.lines
        assert started["agents"] == ["demo", "demo-93s", "demo-tools", "local"]
        assert [line["event"] for line in turns] == ["run.started", "run.first_token", "run.ended"]
        assert all(line["run_id"] == run_id for line in turns)
        assert all(line["level"] == "info" and line["timestamp"].endswith("Z") for line in turns)
        assert (turns[0]["agent_id"], turns[0]["model"]) == ("local", "m")
        assert 100 <= turns[1]["ttfb_ms"] < turns[2]["elapsed_ms"]
        assert 500 <= turns[2]["elapsed_ms"] < 1000 * LONG
        assert (turns[2]["reason"], turns[2]["tokens"]) == ("done", 9)


async def test_no_key_prompt_or_answer_is_in_the_log(tmp_path: Path) -> None:
    async with site(tmp_path, "--log-level", "debug") as lumos:
        async with lumos.open_chat() as answer:
            await answer.read_to_end()
            run_id = answer.response.headers["X-Run-Id"]
        state = (await lumos.client.get(f"{lumos.url}/api/v1/runs/{run_id}")).text
        lumos.serve.process.terminate()
        assert await lumos.serve.wait_exit() == 0
        for secret in (SECRET, "the prompt", "word1"):
            assert secret not in lumos.serve.output
        assert SECRET not in state
        assert lumos.vendor.calls[0].body["messages"][-1]["content"] == "the prompt"


# Signals


async def test_sigterm_lets_a_stream_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async with site(tmp_path, recording=steady_recording(first=0.1, gap=0.05, last=1.5)) as lumos:
        async with lumos.open_chat() as answer:
            await answer.read_text()
            lumos.serve.process.terminate()
            draining = await lumos.serve.wait_line("server.draining")
            assert (draining["active_runs"], draining["drain_seconds"]) == (1, 30.0)
            assert await lumos.status("/health/ready") == 503
            assert await lumos.status("/health/live") == 200
            url = f"{lumos.url}/api/v1/agents/local/chat/lumosai/stream"
            refused = await lumos.client.post(url, json={"message": "hi"})
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
            assert isinstance(await answer.read_to_end(), GenerationComplete)
        assert await lumos.serve.wait_exit() == 0
        assert lumos.serve.lines[-1]["event"] == "server.ended"


async def test_what_outlasts_the_drain_ends_with_draining(tmp_path: Path) -> None:
    async with site(tmp_path, "--drain", "0.5", recording=STEADY) as lumos:
        async with lumos.open_chat() as answer:
            await answer.read_text()
            lumos.serve.process.terminate()
            signalled_at = trio.current_time()
            await assert_ends_with_draining(answer)
            assert 0.4 < trio.current_time() - signalled_at < 5
        assert await lumos.serve.wait_exit() == 0
        assert (await lumos.serve.wait_line("run.ended"))["reason"] == "error:draining"


async def assert_ends_with_draining(answer: LiveAnswer) -> None:
    last = await answer.read_to_end()
    assert isinstance(last, Error)
    assert last.code == "draining"


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]],
    ids=["Ctrl-C", "SIGTERM twice", "SIGTERM, Ctrl-C"],
)
async def test_ctrl_c_or_a_second_signal_ends_streams_at_once(signals: Sequence[int], tmp_path: Path) -> None:
    async with site(tmp_path, recording=STEADY) as lumos:
        async with lumos.open_chat() as answer:
            await answer.read_text()
            for signum in signals:
                lumos.serve.process.send_signal(signum)
                await lumos.serve.wait_line("server.draining")
            await assert_ends_with_draining(answer)
        assert await lumos.serve.wait_exit() == 0
        assert "Traceback" not in lumos.serve.output


async def test_sigterm_closes_idle_connections_at_once(tmp_path: Path) -> None:
    async with site(tmp_path) as lumos, AsyncExitStack() as streams:
        for _ in range(5):
            await lumos.status("/health/live")
            port = httpx.URL(lumos.url).port
            assert port is not None
            await streams.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
        lumos.serve.process.terminate()
        with trio.fail_after(2):
            assert await lumos.serve.wait_exit() == 0


# Limits


async def test_h8_out_of_descriptors_a_stream_goes_on_and_the_server_recovers(tmp_path: Path) -> None:
    limit = 48
    async with site(tmp_path, recording=steady_recording(first=0.1, gap=0.05, last=2.0)) as lumos:
        resource.prlimit(lumos.serve.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        async with lumos.open_chat() as answer:
            await answer.read_text()
            with ExitStack() as flood:
                for _ in range(2 * limit):
                    flood.enter_context(socket.create_connection(("127.0.0.1", httpx.URL(lumos.url).port)))
                complaint = await lumos.serve.wait_line(
                    "accept returned EMFILE (Too many open files); retrying in 0.1 seconds"
                )
                assert complaint["level"] == "error"
                assert isinstance(await answer.read_to_end(), GenerationComplete)
        with trio.fail_after(LONG):
            assert await lumos.status("/health/ready") == 200
        lumos.serve.process.terminate()
        assert await lumos.serve.wait_exit() == 0


async def test_a_log_that_nobody_takes_stops_nothing(tmp_path: Path) -> None:
    async with site(tmp_path) as lumos:
        lumos.serve.refuse_output()
        for _ in range(2):
            async with lumos.open_chat() as answer:
                assert isinstance(await answer.read_to_end(), GenerationComplete)
        lumos.serve.process.terminate()
        assert await lumos.serve.wait_exit() == 0
