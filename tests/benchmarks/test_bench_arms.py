"""The benchmark's arms: those without an environment of their own relay and leave nothing; costs are read right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from benchmarks.bench import environments
from benchmarks.bench.arm_servers.floor import Relay
from benchmarks.bench.arms import ARMS, Arm, find_arm, started
from benchmarks.bench.process import (
    ServerFailedError,
    ServerProcess,
    before_others,
    cpu_seconds,
    free_port,
    open_descriptors,
    pss_bytes,
    running,
    session_processes,
)
from benchmarks.bench.smoke import MODEL, TOOLS_MODEL, ask, small_upstream, smoke_table, text_of, try_out

PEERS = [arm for arm in ARMS if arm.environment]

SERVER = """
import os, signal, socket, subprocess, sys
{first}
with socket.create_server(("127.0.0.1", int(os.environ["PORT"]))) as listener:
    while True:
        with listener.accept()[0] as client:
            client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
"""
ROUNDING = 1e-6
REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi"
ANSWER = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"


def serve(
    folder: Path, first: str = "", core: int | None = None, first_of_all: bool = False
) -> AbstractContextManager[ServerProcess]:
    port = free_port()
    command = [sys.executable, "-S", "-c", SERVER.format(first=first)]
    return running(
        command, {"PORT": str(port)}, port=port, ready_path="/", folder=folder, core=core, first=first_of_all
    )


@pytest.mark.parametrize(("name", "done"), [("lumos", "chat, tools, memory"), ("floor", "chat")])
def test_an_arm_relays_a_stream_and_leaves_nothing(
    name: str, done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with small_upstream() as upstream:
        with started(find_arm(name), upstream.url, [MODEL, TOOLS_MODEL]) as arm:
            assert try_out(arm, upstream) == done
            cost = arm.process.cost()
            assert len(os.listdir(tmp_path)) == 1
            stopped = arm.process.stop()
        assert session_processes(arm.process.pid) == []
    assert upstream.asked[0]["model"] == MODEL
    assert cost.processes == 1
    assert cost.cpu_seconds > 0
    assert cost.pss_bytes > 2**20
    assert stopped.killed == 0
    assert os.listdir(tmp_path) == []


def test_the_floor_relays_to_the_byte_what_the_upstream_says() -> None:
    floor = find_arm("floor")
    with small_upstream() as upstream, started(floor, upstream.url, [MODEL]) as arm:
        request = floor.request(MODEL, "hi")
        relayed = ask(arm.process.port, request, floor.end_marker)
        assert relayed == ask(upstream.server_port, request, floor.end_marker)


def test_the_smoke_table_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arm: Arm) -> str:
        raise ServerFailedError("it ended")

    monkeypatch.setattr("benchmarks.bench.smoke.smoke", fail)
    assert not smoke_table([find_arm("floor")])
    assert "| NO: ServerFailedError: it ended |" in capsys.readouterr().out


@pytest.mark.parametrize("arm", PEERS, ids=[arm.name for arm in PEERS])
def test_a_peer_is_pinned_whole_and_from_no_named_place(arm: Arm) -> None:
    lines = environments.requirements_file(arm.environment).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(len(pin.split("==")) == 2 and "/" not in pin for pin in pins)
    assert set(arm.versions()) == set(arm.packages)


def test_marks_of_the_caller_reach_path_and_body_as_they_are() -> None:
    for arm in ARMS:
        for agent in (False, True) if arm.agent_path else (False,):
            headers = {"Authorization": "Bearer k"}
            request = arm.request("@MODEL@", "@MESSAGE@", headers=headers, session="@SESSION@", agent=agent)
            assert "@MODEL@" in request.path + request.body
            assert "@MESSAGE@" in request.body
            assert arm.completions or "@SESSION@" in request.body
            assert request.headers["Authorization"] == "Bearer k"


def test_lumos_is_told_to_end_runs_at_once_only_when_asked() -> None:
    lumos = find_arm("lumos")
    assert '"on_disconnect":"cancel"' in lumos.request("m", "hi", leaving_cancels=True).body
    assert "on_disconnect" not in lumos.request("m", "hi").body
    assert lumos.request("m", "hi", agent=True).path == "/api/v1/agents/agent-m/chat/lumosai/stream"


def test_text_is_found_behind_escapes() -> None:
    stream = b'data: {"content":"a\\"b\\\\"}\n\ndata: {"content":"\\u4e09"}\n\ndata: [DONE]\n\n'
    assert text_of(find_arm("fastapi-httpx"), stream) == 'a"b\\\u4e09'


def test_an_unknown_arm_is_named_beside_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no arm 'lumen'; there are lumos, floor, "):
        find_arm("lumen")


def test_cpu_time_is_what_the_process_itself_counts() -> None:
    subprocess.run([sys.executable, "-S", "-c", "sum(range(2_000_000))"], check=True)
    times = os.times()
    children = times.children_user + times.children_system
    assert children > 0
    before = time.process_time()
    counted = cpu_seconds(os.getpid()) - children
    assert before - ROUNDING <= counted <= time.process_time() + ROUNDING


def test_memory_and_descriptors_are_what_the_process_takes() -> None:
    memory, files = pss_bytes(os.getpid()), open_descriptors(os.getpid())
    taken = b"x" * 2**26
    pipes = os.pipe()
    try:
        assert open_descriptors(os.getpid()) == files + 2
        assert 0.99 < (pss_bytes(os.getpid()) - memory) / len(taken) < 1.02
    finally:
        for end in pipes:
            os.close(end)


def test_a_process_that_has_ended_costs_nothing() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        process.wait()
    assert (cpu_seconds(process.pid), pss_bytes(process.pid), open_descriptors(process.pid)) == (0.0, 0, 0)


def test_a_server_is_bound_to_its_core_and_we_are_not(tmp_path: Path) -> None:
    ours = os.sched_getaffinity(0)
    core = max(ours)
    with serve(tmp_path, core=core) as server:
        assert os.sched_getaffinity(server.pid) == {core}
        assert os.sched_getaffinity(0) == ours
        assert server.start_seconds > 0


def test_a_server_runs_before_others_where_that_is_allowed_and_we_do_not(tmp_path: Path) -> None:
    ours = os.sched_getscheduler(0)
    with before_others(True):
        allowed = os.sched_getscheduler(0)
    with serve(tmp_path, first_of_all=True) as server:
        assert os.sched_getscheduler(server.pid) == allowed
        assert os.sched_getscheduler(0) == ours
    assert allowed in (os.SCHED_RR, ours)


def test_children_are_counted_and_do_not_outlive_their_server(tmp_path: Path) -> None:
    first = 'subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])'
    with serve(tmp_path, first) as server:
        assert server.cost().processes == 2
        stopped = server.stop()
        assert session_processes(server.pid) == []
    assert stopped.killed == 1


def test_a_server_that_does_not_listen_to_sigterm_is_killed(tmp_path: Path) -> None:
    with serve(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)") as server:
        stopped = server.stop(0.05)
        assert stopped.returncode == -9
        assert not server.alive


def test_a_server_that_ends_says_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailedError, match=r"the server ended; its last lines:\nno such luck"),
        serve(tmp_path, "sys.exit('no such luck')"),
    ):
        pass


class Upstream:
    """Gives its n-th request the n-th answer, or none at all.

    Attributes:
        connections: of each request.
        gone: a connection has been closed by who made it.
    """

    def __init__(self, *answers: bytes) -> None:
        self._answers = iter(answers)
        self.connections: list[trio.SocketStream] = []
        self.asked = trio.Event()
        self.gone = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                self.connections.append(stream)
                self.asked.set()
                if answer := next(self._answers, b""):
                    await stream.send_all(answer)
            self.gone.set()


@asynccontextmanager
async def floor_before(upstream: Upstream) -> AsyncIterator[trio.SocketStream]:
    """A client of a floor in this process."""
    async with trio.open_nursery() as nursery:

        async def listen(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> int:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            port: int = listener.socket.getsockname()[1]
            return port

        relay = Relay("127.0.0.1", await listen(upstream.serve))
        port = await listen(lambda stream: relay.serve(stream.socket))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            yield client
        nursery.cancel_scope.cancel()
    relay.close()


async def read(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := await stream.receive_some()):
        data += more
    return data


async def test_the_floor_uses_a_connection_again() -> None:
    upstream = Upstream(ANSWER, ANSWER)
    async with floor_before(upstream) as client:
        for _ in range(2):
            await client.send_all(REQUEST)
            assert await read(client, len(ANSWER)) == ANSWER
    assert len(upstream.connections) == 2
    assert upstream.connections[0] is upstream.connections[1]


async def test_the_floor_waits_for_a_body_that_comes_later() -> None:
    upstream = Upstream(ANSWER)
    async with floor_before(upstream) as client:
        await client.send_all(REQUEST[:-1])
        await trio.testing.wait_all_tasks_blocked()
        assert not upstream.connections
        await client.send_all(REQUEST[-1:])
        assert await read(client, len(ANSWER)) == ANSWER


async def test_the_floor_leaves_the_upstream_when_its_client_leaves() -> None:
    upstream = Upstream(b"")
    async with floor_before(upstream) as client:
        await client.send_all(REQUEST)
        await upstream.asked.wait()
        await client.aclose()
        await upstream.gone.wait()


async def test_the_floor_closes_an_answer_that_breaks_off() -> None:
    class Breaking(Upstream):
        async def serve(self, stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(ANSWER[:-5])
            await stream.aclose()

    async with floor_before(Breaking()) as client:
        await client.send_all(REQUEST)
        assert await read(client, len(ANSWER)) == ANSWER[:-5]
