"""Bodies that are taken where all sockets are read: through HTTP and TLS, on real sockets and in memory."""

from __future__ import annotations

import httpx
import pytest
import trio
from trio.testing import MockClock

from providers.transport import TrioTransport

from .certificates import Certificate
from .scripted_network import receive_all
from .sharing import Taker, sharing
from .test_network import LoopbackServer, serve_on_loopback, tls_in_memory


@pytest.fixture(params=["http", "https"])
async def loopback(request: pytest.FixtureRequest, certificate: Certificate, nursery: trio.Nursery) -> LoopbackServer:
    return await serve_on_loopback(nursery, certificate if request.param == "https" else None)


async def test_loopback_a_body_is_taken_where_all_sockets_are_read(
    loopback: LoopbackServer, certificate: Certificate
) -> None:
    transport = TrioTransport(ssl_context=certificate.trusting_context())
    async with sharing(), httpx.AsyncClient(transport=transport, trust_env=False) as client:
        for most in (1000, 2):
            async with client.stream("POST", loopback.url, content=b"{}") as response:
                body, taker, rest = response.extensions["body"], Taker(most), []
                while len(taker.taken) < most and (chunk := await body.receive(taker.take)):
                    rest.append(chunk)
                if most == 2:
                    assert not body.finished
                    rest += await receive_all(response)
            assert b"".join(rest + taker.taken).count(b"token") == 5
            assert trio.lowlevel.current_task() not in taker.in_tasks[1:]
            assert len(taker.taken) >= 2
    assert loopback.connections == 1


async def test_loopback_what_a_taker_raises_closes_the_connection(
    loopback: LoopbackServer, certificate: Certificate
) -> None:
    def refuse(chunk: bytes) -> bool:
        raise LookupError(chunk)

    async def read(response: httpx.Response) -> None:
        while await response.extensions["body"].receive(refuse):
            pass

    transport = TrioTransport(ssl_context=certificate.trusting_context())
    async with sharing(), httpx.AsyncClient(transport=transport, trust_env=False) as client:
        async with client.stream("POST", loopback.url, content=b"{}") as response:
            with pytest.raises(LookupError):
                await read(response)
        assert transport.open_connections == transport.idle_connections == 0


async def test_tls_hands_on_what_each_read_brings(certificate: Certificate, autojump_clock: MockClock) -> None:
    taker = Taker(3)
    async with tls_in_memory(certificate) as hop, trio.open_nursery() as nursery:
        nursery.start_soon(hop.client.read_into, taker.take)
        for record in (b"a", b"b", b"c", b"d"):
            await trio.sleep(1)
            await hop.server.send_all(record)
        await trio.sleep(1)
        assert await hop.client.receive_some() == b"d"
    assert taker.taken == [b"a", b"b", b"c"]


@pytest.mark.parametrize("politely", [True, False])
async def test_the_end_of_tls_is_handed_on_after_its_data(
    certificate: Certificate, autojump_clock: MockClock, *, politely: bool
) -> None:
    taker = Taker(1000)
    async with tls_in_memory(certificate) as hop, trio.open_nursery() as nursery:
        nursery.start_soon(hop.client.read_into, taker.take)
        for record in (b"first", b"last"):
            await trio.sleep(1)
            await hop.server.send_all(record)
        await (hop.server if politely else hop.wire).aclose()
    assert taker.taken == [b"first", b"last", b""]


async def test_broken_tls_is_a_broken_stream_though_more_may_come(
    certificate: Certificate, autojump_clock: MockClock
) -> None:
    taker = Taker(1000)

    async def read() -> None:
        with pytest.raises(trio.BrokenResourceError, match="TLS failed"):
            await hop.client.read_into(taker.take)
        broken_at.append(trio.current_time())

    broken_at: list[float] = []
    async with tls_in_memory(certificate) as hop, trio.open_nursery() as nursery:
        begun_at = trio.current_time()
        nursery.start_soon(read)
        for record in (b"first", b"last"):
            await trio.sleep(1)
            await hop.server.send_all(record)
        await hop.wire.send_all(b"no record at all")
        await trio.sleep(1)
    assert taker.taken == [b"first", b"last"]
    assert broken_at == [begun_at + 2]
