"""Reading a TCP connection: on real sockets, since there are no others to wait for."""

from __future__ import annotations

import errno
import gc
import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from providers.network import is_readable
from providers.tcp import open_tcp

from .sharing import Pair, connected, reset

pair = pytest.fixture(connected, name="pair")


async def test_it_waits_and_takes_all_there_is(pair: Pair) -> None:
    stream, far = pair
    read: list[bytes] = []

    async def receive() -> None:
        read.append(await stream.receive_some(10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        assert not is_readable(stream)
        far.sendall(b"abc" * 5)
    assert read == [b"abcabcabca"]
    assert is_readable(stream)
    assert await stream.receive_some() == b"bcabc"


async def test_the_end_is_empty_as_often_as_it_is_read(pair: Pair) -> None:
    stream, far = pair
    far.close()
    assert [await stream.receive_some(), await stream.receive_some()] == [b"", b""]


async def test_a_reset_is_a_broken_stream(pair: Pair) -> None:
    stream, far = pair
    reset(far)
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()


async def test_closing_ends_a_read_and_refuses_the_next(pair: Pair) -> None:
    stream, _ = pair
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


async def test_a_cancelled_read_takes_nothing(pair: Pair) -> None:
    stream, far = pair
    far.sendall(b"kept")
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.receive_some()
    assert await stream.receive_some() == b"kept"
    await stream.send_all(b"back")
    await stream.wait_send_all_might_not_block()
    assert far.recv(10) == b"back"


async def test_what_the_socket_takes_at_once_is_sent_without_waiting(pair: Pair) -> None:
    stream, far = pair
    sending = stream.send_all(b"abc")
    with pytest.raises(StopIteration):
        sending.send(None)  # a wait would yield to trio's loop here
    assert far.recv(10) == b"abc"


async def test_what_the_socket_does_not_take_at_once_is_sent_when_it_does(pair: Pair) -> None:
    stream, far = pair
    data = bytes(range(256)) * 40_000
    read = bytearray()
    far.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        while len(read) < len(data):
            await trio.lowlevel.wait_readable(far)
            read += far.recv(1 << 20)
    assert bytes(read) == data


async def test_a_cancelled_send_sends_nothing(pair: Pair) -> None:
    stream, far = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.send_all(b"abc")
    assert scope.cancelled_caught
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(10)


async def test_sending_to_a_peer_that_is_gone_is_a_broken_stream(pair: Pair) -> None:
    stream, far = pair
    reset(far)
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"abc")


async def test_closing_ends_a_send_that_waits(pair: Pair) -> None:
    stream, _ = pair
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(bytes(10_000_000))

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.wait_send_all_might_not_block()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["an address", "a name"])
async def test_it_connects(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream, (far, _) = await open_tcp(host, listener.getsockname()[1]), listener.accept()
        with far:
            await stream.send_all(b"abc")
            assert far.recv(10) == b"abc"
            await stream.aclose()
            await stream.aclose()
            assert far.recv(10) == b""


async def test_nobody_at_an_address_is_told_with_its_reason() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError) as refused:
            await open_tcp("127.0.0.1", unused.getsockname()[1])
    assert refused.value.errno == errno.ECONNREFUSED


async def test_a_connection_that_takes_long_can_be_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        full = [socket.create_connection(listener.getsockname())]  # one has its place, the next ones hear nothing
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(open_tcp, *listener.getsockname())
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        gc.collect()  # a socket that was left open warns here
        full[0].close()


async def test_who_is_cancelled_already_does_not_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            await open_tcp(*listener.getsockname())
        assert scope.cancelled_caught
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_sending_on_what_was_closed_here_says_so(pair: Pair) -> None:
    stream, _ = pair
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"abc")
