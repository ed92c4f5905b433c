"""TLS and real sockets: what verification refuses, bursts read whole, and no descriptor left after any cancellation."""

from __future__ import annotations

import os
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h11
import httpx
import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, memory_stream_pair

from providers.http import open_client
from providers.network import NetworkConfigError, TcpConnect, TlsStream, Trust
from providers.proxy import ProxyConnect
from providers.transport import TrioTransport

from .certificates import Certificate
from .scripted_network import ServerEnd, chunk, chunked_head, receive_all, with_length

HELLO = with_length(b"hello")
MODEL_ANSWER = (chunked_head(), *(chunk(b"token") for _ in range(5)), chunk(b""))


class Corked(trio.abc.Stream):
    """A stream that holds back what is sent until ``pour``."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._held = b""
        self.corked = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._held += data
        if not self.corked:
            await self.pour(len(self._held))

    async def pour(self, count: int) -> None:
        """Send the first ``count`` bytes held."""
        data, self._held = self._held[:count], self._held[count:]
        await self._stream.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class Hop(NamedTuple):
    """Both ends of a TLS connection, and the bytes on their way to the client."""

    client: TlsStream
    server: trio.SSLStream[Corked]
    wire: Corked


@asynccontextmanager
async def tls_in_memory(certificate: Certificate) -> AsyncIterator[Hop]:
    near, far = memory_stream_pair()
    wire = Corked(far)
    client = TlsStream(near, certificate.trusting_context(), "localhost")
    server = trio.SSLStream(wire, certificate.server_context(), server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    async with client:
        yield Hop(client, server, wire)


async def test_a_burst_of_tls_records_is_one_read(certificate: Certificate, autojump_clock: MockClock) -> None:
    async with tls_in_memory(certificate) as hop:
        for record in (b"a", b"b", b"c"):
            await hop.server.send_all(record)
        assert await hop.client.receive_some(65_536) == b"abc"


async def test_no_read_of_tls_is_in_vain(
    certificate: Certificate, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tls_in_memory(certificate) as hop:
        await hop.server.send_all(b"a")
        assert await hop.client.receive_some() == b"a"  # after the handshake there may be anything
        reads = 0
        read = ssl.SSLObject.read

        def counted(tls: ssl.SSLObject, length: int) -> bytes:
            nonlocal reads
            reads += 1
            return read(tls, length)

        monkeypatch.setattr(ssl.SSLObject, "read", counted)
        for record in (b"b", b"c"):
            await hop.server.send_all(record)
            assert await hop.client.receive_some() == record
    assert reads == 2


async def test_tls_carries_a_large_request(certificate: Certificate, autojump_clock: MockClock) -> None:
    async with tls_in_memory(certificate) as hop:
        await hop.client.send_all(b"x" * 100_000)
        received = 0
        while received < 100_000:
            received += len(await hop.server.receive_some())
        await hop.client.wait_send_all_might_not_block()


async def test_a_record_comes_once_it_is_whole(certificate: Certificate, autojump_clock: MockClock) -> None:
    async with tls_in_memory(certificate) as hop:
        await hop.server.send_all(b"first")
        assert await hop.client.receive_some() == b"first"
        hop.wire.corked = True
        await hop.server.send_all(b"second")
        await hop.wire.pour(10)
        with trio.move_on_after(1) as scope:
            await hop.client.receive_some()
        assert scope.cancelled_caught
        await hop.wire.pour(1000)
        assert await hop.client.receive_some() == b"second"


@pytest.mark.parametrize("politely", [True, False])
async def test_the_end_of_tls_comes_after_its_data(
    certificate: Certificate, autojump_clock: MockClock, politely: bool
) -> None:
    async with tls_in_memory(certificate) as hop:
        await hop.server.send_all(b"last")
        await (hop.server if politely else hop.wire).aclose()
        assert await hop.client.receive_some() == b"last"
        assert hop.client.is_readable() == politely
        assert [await hop.client.receive_some() for _ in range(2)] == [b"", b""]
        assert hop.client.is_readable()


@pytest.mark.parametrize("said", [b"", b"last"])
async def test_broken_tls_is_a_broken_stream_after_its_data(
    certificate: Certificate, autojump_clock: MockClock, said: bytes
) -> None:
    async with tls_in_memory(certificate) as hop:
        await hop.server.send_all(said)
        await hop.wire.send_all(b"no record at all")
        if said:
            assert await hop.client.receive_some() == said
            assert hop.client.is_readable()
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError, match="TLS failed"):
                await hop.client.receive_some()
        with pytest.raises(trio.BrokenResourceError, match="TLS failed"):
            await hop.client.send_all(b"more")


class LoopbackServer:
    """Answers on ``listener``: a GET gets ``HELLO``, a POST five tokens, a DELETE ``HELLO`` and the end,
    a PATCH ``HELLO`` and a little later an answer to nothing.

    ``connections`` counts those that were accepted, ``protocols`` holds what ALPN agreed on for each request.
    """

    def __init__(self, listener: trio.SocketListener, certificate: Certificate | None) -> None:
        self.connections = 0
        self.protocols: list[str | None] = []
        self.port = listener.socket.getsockname()[1]
        self._context = certificate.server_context() if certificate else None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self._context else 'http'}://localhost:{self.port}/"

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection to its end."""
        self.connections += 1
        if self._context:
            stream = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
        try:
            async with stream:
                await self._answer(stream)
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass

    async def _answer(self, stream: trio.abc.Stream) -> None:
        server = ServerEnd(stream, ("localhost", self.port, self._context is not None))
        while request := await server.request():
            if isinstance(stream, trio.SSLStream):
                self.protocols.append(stream.selected_alpn_protocol())
            if request.head.method == b"POST":
                await server.say(*MODEL_ANSWER, every=0.001)
            else:
                await server.say(HELLO, every=0)
            if request.head.method == b"DELETE":
                return
            if request.head.method == b"PATCH":
                await trio.sleep(0.01)
                await server.say(with_length(b"stray"), every=0)


async def serve_on_loopback(nursery: trio.Nursery, certificate: Certificate | None = None) -> LoopbackServer:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = LoopbackServer(listener, certificate)
    nursery.start_soon(trio.serve_listeners, server.serve, [listener])
    return server


@pytest.fixture(params=["http", "https"])
async def loopback(request: pytest.FixtureRequest, certificate: Certificate, nursery: trio.Nursery) -> LoopbackServer:
    return await serve_on_loopback(nursery, certificate if request.param == "https" else None)


async def test_loopback_reuse(loopback: LoopbackServer, certificate: Certificate) -> None:
    transport = TrioTransport(ssl_context=certificate.trusting_context())
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        for _ in range(5):
            assert (await client.get(loopback.url)).content == b"hello"
        async with client.stream("POST", loopback.url, content=b"{}") as response:
            assert b"".join(await receive_all(response)) == b"token" * 5
    assert loopback.connections == 1


async def test_loopback_a_server_that_closed_while_idle_is_noticed(
    loopback: LoopbackServer, certificate: Certificate
) -> None:
    sent: list[None] = []
    transport = TrioTransport(ssl_context=certificate.trusting_context())
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        await client.delete(loopback.url)
        assert transport.idle_connections == 1
        await trio.sleep(0.05)
        await client.get(loopback.url, extensions={"request_sent": lambda: sent.append(None)})
        assert (loopback.connections, transport.idle_connections, len(sent)) == (2, 1, 1)


async def test_loopback_an_answer_to_nothing_never_answers_the_next_request(
    loopback: LoopbackServer, certificate: Certificate
) -> None:
    transport = TrioTransport(ssl_context=certificate.trusting_context())
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        await client.patch(loopback.url)
        assert transport.idle_connections == 1
        await trio.sleep(0.05)
        assert (await client.get(loopback.url)).content == b"hello"
        assert loopback.connections == 2


async def test_loopback_300_random_cancellations_leave_no_descriptor(
    loopback: LoopbackServer, certificate: Certificate
) -> None:
    async def cancelled_request() -> None:
        with trio.move_on_after(chance.random() * 0.03):
            async with client.stream("POST", loopback.url, content=b"{}") as response:
                await receive_all(response)

    chance = random.Random(7)
    before = open_descriptors()
    transport = TrioTransport(ssl_context=certificate.trusting_context())
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        async with trio.open_nursery() as requests:
            for _ in range(300):
                requests.start_soon(cancelled_request)
                await trio.sleep(0.001)
        assert transport.open_connections == 0
        assert (await client.post(loopback.url)).content == b"token" * 5
    await wait_descriptors(before)


def open_descriptors() -> int:
    """How many file descriptors this process holds."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to count descriptors")
    return len(os.listdir("/proc/self/fd"))


async def wait_descriptors(count: int) -> None:
    """Wait, up to 5 s, until this process holds so many: the servers' ends close by themselves."""
    for _ in range(500):
        if open_descriptors() == count:
            return
        await trio.sleep(0.01)
    assert open_descriptors() == count


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with httpx.AsyncClient(transport=TrioTransport(), trust_env=False) as client:
            with pytest.raises(httpx.ConnectError) as failure:
                await client.get(f"http://127.0.0.1:{port}/")
    assert isinstance(failure.value.__cause__, OSError)


class Resolver(trio.abc.HostnameResolver):
    """Knows one name."""

    async def getaddrinfo(self, host: bytes | None, port: bytes | str | int | None, *args: Any, **kwargs: Any) -> Any:
        if host == b"other.test":
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


async def test_no_such_name(autojump_clock: MockClock) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())
    async with httpx.AsyncClient(transport=TrioTransport(), trust_env=False) as client:
        with pytest.raises(httpx.ConnectError, match="not known"):
            await client.get("http://nobody.invalid/")
        with pytest.raises(httpx.ConnectError, match="label"):
            await client.get("http://a..b/")


@pytest.fixture
async def tls_server(certificate: Certificate, nursery: trio.Nursery) -> LoopbackServer:
    return await serve_on_loopback(nursery, certificate)


async def refused(url: str, ssl_context: ssl.SSLContext | None = None) -> httpx.ConnectError:
    """The error of a request that must not succeed, after which nothing is open."""
    before = open_descriptors()
    async with httpx.AsyncClient(transport=TrioTransport(ssl_context=ssl_context), trust_env=False) as client:
        with pytest.raises(httpx.ConnectError) as failure:
            await client.get(url)
    await wait_descriptors(before)
    return failure.value


async def test_an_untrusted_certificate_is_refused(tls_server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    failure = await refused(tls_server.url)
    assert isinstance(failure.__cause__, ssl.SSLCertVerificationError)


async def test_a_certificate_for_another_name_is_refused(certificate: Certificate, tls_server: LoopbackServer) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())
    failure = await refused(f"https://other.test:{tls_server.port}/", certificate.trusting_context())
    assert isinstance(failure.__cause__, ssl.SSLCertVerificationError)
    assert "Hostname mismatch" in str(failure)


async def test_a_server_without_tls_is_refused(nursery: trio.Nursery, certificate: Certificate) -> None:
    server = await serve_on_loopback(nursery)
    await refused(server.url.replace("http:", "https:"), certificate.trusting_context())


async def test_ssl_cert_file_is_honoured_and_only_http_1_1_is_offered(
    certificate: Certificate, tls_server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    async with httpx.AsyncClient(transport=TrioTransport(), trust_env=False) as client:
        assert (await client.get(tls_server.url)).content == b"hello"
        assert (await client.get(tls_server.url.replace("localhost", "127.0.0.1"))).content == b"hello"
    assert tls_server.protocols == ["http/1.1", "http/1.1"]


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_certificates_that_cannot_be_read_are_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "bundle.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(NetworkConfigError, match="SSL_CERT_FILE"):
        open_client()


async def test_certificates_are_read_once_and_for_the_first_https_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    made: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        made.append(ssl.create_default_context())
        return made[-1]

    monkeypatch.setattr("providers.network.default_ssl_context", make)
    trust = Trust()
    ProxyConnect({}, TcpConnect(trust), trust)
    assert made == []
    with trio.move_on_after(0):
        await trust.context()  # who leaves meanwhile keeps nobody from having them
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(trust.context)
    context = await trust.context()
    assert context is made[-1]
    assert len(made) <= 2


async def test_cancelling_a_handshake_closes_the_socket(nursery: trio.Nursery, certificate: Certificate) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                pass
            closed.set()

    closed = trio.Event()
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, silent, [listener])
    with trio.move_on_after(0.05) as scope:
        await TcpConnect(certificate.trusting_context())("127.0.0.1", listener.socket.getsockname()[1], True)
    assert scope.cancelled_caught
    with trio.fail_after(1):
        await closed.wait()
