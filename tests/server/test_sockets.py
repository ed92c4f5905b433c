"""Real sockets on loopback, on the real clock: Lumos's listener and stream, and the serving code over them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing

import pytest
import trio

from engine import BasicAgent, RunSupervisor
from server.app import Services, create_app
from server.serving import ServingLimits, serve
from server.sockets import SocketListener, SocketStream, listen_tcp
from tests.engine.scripted import FOREVER, SENT, ScriptedProvider, text
from tests.server.raw_http import RawClient, chat_request, request_bytes

LIVE = request_bytes("GET", "/health/live")


class CountingSocket(socket.socket):
    """A listening socket that counts how often it was asked for a connection, and can be told to fail."""

    accept_calls = 0
    failure: OSError | None = None

    def accept(self) -> tuple[socket.socket, object]:
        self.accept_calls += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return super().accept()


@pytest.fixture
def listening() -> Iterator[CountingSocket]:
    """A listening socket on a free port."""
    with CountingSocket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(1024)
        yield sock


def connected(listening: socket.socket) -> socket.socket:
    """A client of it; the kernel completes the connection by itself."""
    return socket.create_connection(listening.getsockname())


async def stream_pair(listening: CountingSocket) -> tuple[SocketStream, socket.socket]:
    """A connection: our end as the server has it, and the client's plain blocking socket."""
    client = connected(listening)
    client.settimeout(5)
    return await SocketListener(listening).accept(), client


def drain(client: socket.socket) -> None:
    """Read all there is."""
    while client.recv(2**20):
        pass


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


# The listener


async def test_one_wake_takes_the_whole_backlog(listening: CountingSocket) -> None:
    listener = SocketListener(listening)
    clients = [connected(listening) for _ in range(50)]
    async with AsyncExitStack() as streams:
        accepted = [await streams.enter_async_context(await listener.accept()) for _ in clients]
        assert listening.accept_calls == 51
        assert [stream.socket.getpeername() for stream in accepted] == [client.getsockname() for client in clients]
    for client in clients:
        client.close()


async def test_accept_waits_for_a_client(listening: CountingSocket) -> None:
    listener = SocketListener(listening)
    with trio.move_on_after(0.05) as waiting:
        await listener.accept()
    assert waiting.cancelled_caught
    with closing(connected(listening)):
        async with await listener.accept() as stream:
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 2**14


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EAGAIN])
async def test_a_client_that_left_while_it_queued_is_passed_over(code: int, listening: CountingSocket) -> None:
    listener = SocketListener(listening)
    listening.failure = OSError(code, os.strerror(code))
    with closing(connected(listening)):
        async with await listener.accept():
            pass


async def test_out_of_descriptors_is_an_error_only_when_nothing_was_accepted(listening: CountingSocket) -> None:
    listener = SocketListener(listening)
    listening.failure = OSError(errno.EMFILE, "too many")
    with closing(connected(listening)):
        with pytest.raises(OSError, match="too many"):
            await listener.accept()
        async with await listener.accept():
            pass


async def test_closing_the_listener_resets_those_who_were_not_served(listening: CountingSocket) -> None:
    before = open_descriptors()
    listener = SocketListener(listening)
    clients = [connected(listening) for _ in range(3)]
    async with await listener.accept():
        await listener.aclose()
        for client in clients[1:]:
            client.settimeout(5)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    for client in clients:
        client.close()
    assert open_descriptors() == before - 1


async def test_a_closed_listener_accepts_no_more_and_wakes_who_waits(listening: CountingSocket) -> None:
    listener = SocketListener(listening)

    async def wait_in_vain() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_in_vain)
        await trio.testing.wait_all_tasks_blocked()
        await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()
    await listener.aclose()


async def test_listeners_on_a_taken_port_are_refused_and_leave_nothing_open() -> None:
    (first,) = listen_tcp("127.0.0.1", 0)
    before = open_descriptors()
    with pytest.raises(OSError, match="Address already in use"):
        listen_tcp("127.0.0.1", first.address[1])
    assert open_descriptors() == before
    await first.aclose()


async def test_a_host_of_several_addresses_gets_one_port() -> None:
    listeners = listen_tcp("", 0)
    assert len({listener.address[1] for listener in listeners}) == 1
    for listener in listeners:
        await listener.aclose()


# The stream


async def test_send_now_writes_what_fits(listening: CountingSocket) -> None:
    stream, client = await stream_pair(listening)
    async with stream:
        assert stream.send_now(b"hello") == 5
        assert client.recv(10) == b"hello"
        data = bytes(8 * 2**20)
        sent = stream.send_now(data)
        assert 0 < sent < len(data)
        while stream.send_now(data):
            pass
        with closing(client):
            assert len(client.recv(10)) == 10


async def test_send_now_to_a_peer_that_is_gone_is_broken(listening: CountingSocket) -> None:
    stream, client = await stream_pair(listening)
    async with stream:
        client.close()
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - the first write may still find room
            stream.send_now(b"x")
            await trio.sleep(0.05)
            stream.send_now(b"x")


async def test_reset_drops_what_is_unsent_and_tells_the_peer(listening: CountingSocket) -> None:
    stream, client = await stream_pair(listening)
    while stream.send_now(bytes(2**20)):
        pass
    stream.reset()
    with closing(client), pytest.raises(ConnectionResetError):
        drain(client)


async def test_reset_wakes_who_reads_and_writes_and_may_be_called_again(listening: CountingSocket) -> None:
    stream, client = await stream_pair(listening)

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    async def write() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(bytes(20 * 2**20))

    with closing(client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked(0.01)
            stream.reset()
        stream.reset()
        await stream.aclose()
        with pytest.raises(trio.BrokenResourceError):
            stream.send_now(b"x")


async def test_a_stream_says_its_end_and_closes(listening: CountingSocket) -> None:
    stream, client = await stream_pair(listening)
    with closing(client):
        await stream.send_eof()
        assert client.recv(1) == b""
        client.sendall(b"still here")
        assert await stream.receive_some() == b"still here"
        await stream.wait_send_all_might_not_block()
        await stream.aclose()


# Serving over them


class Server:
    """Lumos on a free port, with agent ``demo``."""

    def __init__(self, port: int, supervisor: RunSupervisor) -> None:
        self.port = port
        self.supervisor = supervisor
        self.stopping = trio.Event()
        self.stopped = trio.Event()

    async def connect(self, receive_buffer: int | None = None) -> trio.SocketStream:
        """A client; with a receive buffer that small it stalls early."""
        sock = trio.socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        return trio.SocketStream(sock)


@asynccontextmanager
async def server(*said: str, limits: ServingLimits | None = None) -> AsyncIterator[Server]:
    """A server whose agent says that and then nothing more."""
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        provider = ScriptedProvider((0, (SENT, *text(*said))), (FOREVER, ()))
        app = create_app(Services({"demo": BasicAgent(agent_id="demo", provider=provider, model="m")}, supervisor))
        listeners = listen_tcp("127.0.0.1", 0)
        running = Server(listeners[0].address[1], supervisor)

        async def serve_to_the_end(task_status: trio.TaskStatus[None]) -> None:
            await serve(app, listeners, running.stopping, limits, task_status=task_status)
            running.stopped.set()

        await nursery.start(serve_to_the_end)
        yield running
        nursery.cancel_scope.cancel()


async def wait_until(condition: Callable[[], bool]) -> None:
    """Look every 10 ms, for what the kernel tells nobody."""
    with trio.fail_after(5):  # noqa: ASYNC912 - may be so already
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def was_reset(stream: trio.SocketStream) -> bool:
    """Whether the peer has reset the connection."""
    return stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


@pytest.mark.parametrize("how", ["answered", "silent", "left in a stream", "reset in a stream"])
async def test_connections_leave_no_descriptor_behind(how: str) -> None:
    async def visit(lumos: Server) -> None:
        async with await lumos.connect() as stream:
            client = RawClient(stream)
            if how == "answered":
                assert (await client.ask(LIVE)).status == 200
            elif how != "silent":
                await stream.send_all(chat_request(on_disconnect="cancel"))
                await client.read_head()
            if how.startswith("reset"):
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    async with server("hi") as lumos:
        before = open_descriptors()
        for _ in range(4):
            async with trio.open_nursery() as nursery:
                for _ in range(25):
                    nursery.start_soon(visit, lumos)
        await wait_until(lambda: open_descriptors() == before and lumos.supervisor.active_runs == 0)


SEVEN_MEGABYTES = "x" * 7 * 2**20
"""More than the kernel's buffers take."""


async def test_h2_a_client_that_never_reads_is_reset_after_the_stall_limit() -> None:
    limits = ServingLimits(write_stall=0.2)
    async with server(SEVEN_MEGABYTES, limits=limits) as lumos, await lumos.connect(receive_buffer=4096) as stream:
        await stream.send_all(chat_request())
        started = trio.current_time()
        await wait_until(lambda: was_reset(stream))
        assert trio.current_time() - started >= 0.2


async def test_h2_a_client_that_never_reads_cannot_hold_the_shutdown() -> None:
    limits = ServingLimits(closing=0.2)
    async with server(SEVEN_MEGABYTES, limits=limits) as lumos, await lumos.connect(receive_buffer=4096) as stream:
        await stream.send_all(chat_request())
        await wait_until(lambda: lumos.supervisor.active_runs == 1)
        await trio.sleep(0.2)
        lumos.stopping.set()
        with trio.fail_after(2):
            await lumos.stopped.wait()
        await wait_until(lambda: was_reset(stream))


async def test_an_early_answer_reaches_a_client_that_still_sends() -> None:
    async with server("hi") as lumos, await lumos.connect() as stream:
        body = bytes(5_000_000)
        answer = await RawClient(stream).ask(request_bytes("POST", "/api/v1/agents/demo/chat/lumosai", body))
        assert answer.status == 413
