"""Proxies: which requests go through which, tunnels, forwarding, what a proxy may answer, and that no secret shows."""

from __future__ import annotations

import random
import ssl
from base64 import b64encode
from collections.abc import Iterator
from functools import partial

import httpx
import pytest
import trio
from trio.testing import MockClock

from engine.errors import ProviderError
from engine.pieces import Piece
from providers.http import VendorRequest, open_client, stream_answer
from providers.network import Connect, NetworkConfigError, TcpConnect, open_tls
from providers.openai_chat import ChatDecoder
from providers.proxy import Proxy, ProxyConnect
from providers.transport import TrioTransport

from .certificates import Certificate
from .scripted_network import (
    Script,
    ScriptedNetwork,
    ServerEnd,
    answering,
    chunk,
    chunked_head,
    receive_all,
    with_length,
)
from .test_network import LoopbackServer, open_descriptors, serve_on_loopback, wait_descriptors

HELLO = with_length(b"hello")
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
PASSWORD = "s3cr3t/p@ss"
CREDENTIALS = b"Basic " + b64encode(b"ada:" + PASSWORD.encode())
SECRETS = (PASSWORD, "s3cr3t", CREDENTIALS.decode().split()[1])
PROXY = "http://ada:s3cr3t%2Fp%40ss@proxy.test:3128"
NO_TRUST = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
ENVIRONMENT = {"https_proxy": PROXY, "http_proxy": PROXY}


class DialledError(Exception):
    """Stops a connection on its way; ``args`` is where it went."""


async def dial(host: str, port: int, tls: bool) -> trio.abc.Stream:
    """A ``Connect`` that only tells where it was sent."""
    raise DialledError(host, port, tls)


async def way(environment: dict[str, str], host: str, port: int = 443, tls: bool = True) -> str:
    """Where a connection to the host first goes: "direct", or the proxy as host, port and a mark for TLS."""
    with pytest.raises(DialledError) as dialled:
        await ProxyConnect(environment, dial, NO_TRUST)(host, port, tls)
    to_host, to_port, to_tls = dialled.value.args
    return "direct" if to_host == host else f"{to_host}:{to_port}{' tls' if to_tls else ''}"


@pytest.mark.parametrize(
    ("environment", "https_way", "http_way"),
    [
        ({}, "direct", "direct"),
        ({"https_proxy": "http://a:1"}, "a:1", "direct"),
        ({"HTTPS_PROXY": "http://a:1"}, "a:1", "direct"),
        ({"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:1"}, "a:1", "direct"),
        ({"https_proxy": " ", "HTTPS_PROXY": "http://b:1"}, "b:1", "direct"),
        ({"http_proxy": "http://a:1"}, "direct", "a:1"),
        ({"HTTP_PROXY": "http://a:1"}, "direct", "direct"),
        ({"all_proxy": "http://a:1"}, "a:1", "a:1"),
        ({"ALL_PROXY": "http://a:1", "https_proxy": "http://b:1"}, "b:1", "a:1"),
        ({"ALL_PROXY": "http://a:1", "all_proxy": "http://b:1"}, "b:1", "b:1"),
        ({"ALL_PROXY": "socks5://a:1", "http_proxy": "http://b:1", "https_proxy": "b:2"}, "b:2", "b:1"),
        ({"all_proxy": "a"}, "a:80", "a:80"),
        ({"all_proxy": "HTTP://a/"}, "a:80", "a:80"),
        ({"all_proxy": "https://a"}, "a:443 tls", "a:443 tls"),
        ({"all_proxy": "ada:pw@a:8080"}, "a:8080", "a:8080"),
        ({"all_proxy": "http://[::1]:8080"}, "::1:8080", "::1:8080"),
        ({"all_proxy": "http://bücher.test:1"}, "xn--bcher-kva.test:1", "xn--bcher-kva.test:1"),
    ],
)
async def test_which_variable_names_the_proxy(
    autojump_clock: MockClock, environment: dict[str, str], https_way: str, http_way: str
) -> None:
    assert await way(environment, "model.test", 443, tls=True) == https_way
    assert await way(environment, "model.test", 80, tls=False) == http_way


@pytest.mark.parametrize(
    ("listed", "past", "through"),
    [
        ("", [], ["model.test"]),
        ("*", ["model.test", "10.0.0.1", "::2"], []),
        ("other.test,*", ["model.test"], []),
        ("model.test", ["model.test", "MODEL.test", "model.test.", "eu.model.test"], ["xmodel.test", "model.test.x"]),
        (".model.test", ["model.test", "eu.model.test"], ["xmodel.test"]),
        ("*.model.test.", ["model.test", "eu.model.test"], ["xmodel.test"]),
        ("Model.TEST", ["model.test"], ["test"]),
        ("a.test, b.test  c.test,,", ["a.test", "b.test", "c.test"], ["d.test"]),
        ("test:443", ["model.test"], []),
        ("model.test:8443", [], ["model.test"]),
        ("*:443", ["model.test"], []),
        ("*:80", [], ["model.test"]),
        ("10.1.2.3", ["10.1.2.3", "::ffff:10.1.2.3"], ["10.1.2.30", "110.1.2.3", "10.1.2.3.test"]),
        ("10.0.0.0/8", ["10.1.2.3"], ["11.1.2.3", "model.test", "::a"]),
        ("10.9.9.9/8", ["10.1.2.3"], ["11.1.2.3"]),
        ("10.0.0.0/8:443", ["10.1.2.3"], ["11.1.2.3"]),
        ("10.0.0.0/8:80", [], ["10.1.2.3"]),
        ("2001:db8::/32", ["2001:db8::1"], ["2001:db9::1", "10.0.0.1"]),
        ("2001:DB8::1", ["2001:db8:0::1"], ["2001:db8::2"]),
        ("[2001:db8::1]", ["2001:db8::1"], ["2001:db8::2"]),
        ("[2001:db8::1]:443", ["2001:db8::1"], ["2001:db8::2"]),
        ("[2001:db8::1]:80", [], ["2001:db8::1"]),
        ("fe80::/10", ["fe80::1%eth0"], ["fec0::1"]),
        ("., :, :443, [, 10.0.0.0/99, <local>, a:b:c, 1:" + "9" * 5000, [], ["model.test", "10.0.0.1", "::2", "a"]),
        ("", ["localhost", "LOCALHOST.", "api.localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"], []),
        ("", [], ["notlocalhost", "localhost.test", "128.0.0.1", "::2"]),
    ],
)
async def test_which_hosts_go_past_the_proxy(
    autojump_clock: MockClock, listed: str, past: list[str], through: list[str]
) -> None:
    for variable in ("no_proxy", "NO_PROXY"):
        environment = {"all_proxy": "http://proxy.test", variable: listed}
        assert [host for host in past + through if await way(environment, host) == "direct"] == past
    overruled = {"all_proxy": "http://proxy.test", "no_proxy": listed or "-", "NO_PROXY": "*"}
    assert [host for host in past + through if await way(overruled, host) == "direct"] == past


async def test_a_port_in_no_proxy_is_the_servers(autojump_clock: MockClock) -> None:
    environment = {"all_proxy": "http://proxy.test", "no_proxy": "model.test:8443"}
    assert await way(environment, "model.test", 8443) == "direct"
    assert await way(environment, "model.test", 84) == "proxy.test:80"


async def test_the_environment_is_read_once(autojump_clock: MockClock) -> None:
    environment = {"https_proxy": "http://proxy.test:1"}
    connect = ProxyConnect(environment, dial, NO_TRUST)
    environment["https_proxy"] = "http://other.test:1"
    with pytest.raises(DialledError) as dialled:
        await connect("model.test", 443, True)
    assert dialled.value.args == ("proxy.test", 1, False)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("socks5://ada:s3cr3t@proxy.test:1080", "SOCKS"),
        ("SOCKS5H://ada:s3cr3t@proxy.test", "SOCKS"),
        ("socks://s3cr3t", "SOCKS"),
        ("ftp://ada:s3cr3t@proxy.test", "is not the URL of a proxy"),
        ("http://ada:s3cr3t/@proxy.test", "percent-encoded"),
        ("http://ada:1/s3cr3t@proxy.test", "percent-encoded"),
        ("http://ada:1#s3cr3t@proxy.test", "percent-encoded"),
        ("http://ada:1?s3cr3t@proxy.test", "percent-encoded"),
        ("http://ada:s3cr3t@proxy.test:0", "is not the URL"),
        ("http://ada:s3cr3t@proxy.test:65536", "is not the URL"),
        ("http://ada:s3cr3t@proxy.test:port", "is not the URL"),
        ("http://ada:s3cr3t@proxy test", "is not the URL"),
        ("http://ada:s3cr3t@", "is not the URL"),
        ("http://ada:s3cr3t@[::1", "is not the URL"),
        ("http://ada:s3cr3t@\xa0", "is not the URL"),
        ("http://ada:s3cr3t\n@proxy.test", "is not the URL"),
        ("http:/s3cr3t", "is not the URL"),
    ],
)
@pytest.mark.parametrize("variable", ["https_proxy", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_used_is_refused_unseen(variable: str, value: str, complaint: str) -> None:
    with pytest.raises(NetworkConfigError, match=complaint) as refused:
        ProxyConnect({variable: value}, dial)
    assert variable in str(refused.value)
    assert all(secret not in text for secret in SECRETS for text in texts_of(refused.value))


def texts_of(error: BaseException) -> Iterator[str]:
    """What the error and all behind it say, in every form."""
    link: BaseException | None = error
    while link is not None:
        yield from (str(link), repr(link), repr(link.args))
        link = link.__cause__ or link.__context__


def test_a_proxy_tells_its_address_only() -> None:
    proxy = Proxy("proxy.test", 3128, False, ((b"Proxy-Authorization", CREDENTIALS),))
    assert (str(proxy), "Basic" in repr(proxy)) == ("proxy.test:3128", False)


def tunnelling(certificate: Certificate, script: Script, *answer: bytes) -> Script:
    """A proxy that lets the first request of each connection have a tunnel, at whose end ``script`` serves over TLS.

    ``answer`` is what it says then, a second apart.
    """

    async def serve(server: ServerEnd) -> None:
        await server.request()
        await server.say(*(answer or (ESTABLISHED,)), every=1 if len(answer) > 1 else 0)
        secured = trio.SSLStream(server.stream, certificate.server_context(), server_side=True, https_compatible=True)
        await script(ServerEnd(secured, server.address))

    return serve


def client_of(connect: Connect, certificate: Certificate, environment: dict[str, str] | None = None) -> TrioTransport:
    """A transport that goes through the proxy."""
    context = certificate.trusting_context()
    return TrioTransport(ProxyConnect(ENVIRONMENT if environment is None else environment, connect, context))


def http(transport: TrioTransport) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport, timeout=None, trust_env=False)


async def test_an_https_request_goes_through_a_tunnel(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    served: list[ServerEnd] = []

    async def model(server: ServerEnd) -> None:
        served.append(server)
        await answering(HELLO)(server)

    network = ScriptedNetwork(nursery, tunnelling(certificate, model))
    async with http(client_of(network, certificate)) as client:
        for _ in range(3):
            response = await client.post("https://model.test/v1/chat", content=b"{}", headers={"Authorization": "k"})
            assert response.content == b"hello"
    [proxy], [end] = network.servers, served
    assert proxy.address == ("proxy.test", 3128, False)
    [connect] = proxy.requests
    assert (connect.head.method, connect.head.target, connect.body) == (b"CONNECT", b"model.test:443", b"")
    assert list(connect.head.headers) == [(b"host", b"model.test:443"), (b"proxy-authorization", CREDENTIALS)]
    assert [(sent.head.method, sent.head.target) for sent in end.requests] == [(b"POST", b"/v1/chat")] * 3
    assert {b"proxy-authorization"}.isdisjoint(name for sent in end.requests for name, _ in sent.head.headers)
    assert network.open == 0


@pytest.mark.parametrize(
    ("proxy", "header"),
    [
        ("http://proxy.test", None),
        ("http://ada@proxy.test", b"ada:"),
        ("http://:pw@proxy.test", b":pw"),
        ("http://%C3%A4:%3A%25@proxy.test", b"\xc3\xa4::%"),
    ],
)
async def test_credentials_are_sent_as_the_url_means_them(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate, proxy: str, header: bytes | None
) -> None:
    network = ScriptedNetwork(nursery, tunnelling(certificate, answering(HELLO)))
    async with http(client_of(network, certificate, {"https_proxy": proxy})) as client:
        await client.get("https://model.test:8443/")
    head = network.servers[0].requests[0].head
    sent = dict(head.headers).get(b"proxy-authorization")
    assert sent == (header if header is None else b"Basic " + b64encode(header))
    assert head.target == b"model.test:8443"


async def test_the_host_of_a_tunnel_may_be_an_ipv6_address(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(with_length(b"", status="403 No")))
    connect = ProxyConnect(ENVIRONMENT, network, NO_TRUST)
    with pytest.raises(ConnectionError, match=r"no tunnel to \[2001:db8::1\]:443 \(HTTP 403\)"):
        await connect("2001:db8::1", 443, True)
    assert network.servers[0].requests[0].head.target == b"[2001:db8::1]:443"


@pytest.mark.parametrize(
    "answer",
    [
        [bytes([byte]) for byte in ESTABLISHED],
        [b"HTTP/1.0 200 OK\r\nProxy-Agent: x\r\n\r\n"],
        [b"HTTP/1.1 200\n\n"],
        [b"HTTP/1.1 204 No Content\r\n\r\n"],
        [with_length(b"", "Connection: close")],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nTransfer-Encoding: chunked\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n" + ESTABLISHED],
        [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60_000, b"\r\n\r\n"],
    ],
    ids=["byte by byte", "HTTP/1.0", "bare newlines", "204", "closing", "framed", "interim", "long"],
)
async def test_what_opens_a_tunnel(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate, answer: list[bytes]
) -> None:
    network = ScriptedNetwork(nursery, tunnelling(certificate, answering(HELLO), *answer))
    async with http(client_of(network, certificate)) as client:
        assert (await client.get("https://model.test/")).content == b"hello"
    assert network.open == 0


async def test_what_comes_of_the_tunnel_with_the_proxys_answer_is_not_lost(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    alert = b"\x15\x03\x03\x00\x02\x02\x28"  # a server that wants no handshake says so before it has begun
    network = ScriptedNetwork(nursery, tunnelling(certificate, answering(HELLO), ESTABLISHED + alert))
    async with http(client_of(network, certificate)) as client:
        with pytest.raises(httpx.ConnectError, match=r"(?i)alert handshake failure"):
            await client.get("https://model.test/")
    assert network.open == 0


REFUSALS = {
    "407": ([with_length(b"who?", status="407 Say s3cr3t")], "wants other credentials .HTTP 407."),
    "403": ([with_length(b"no", status="403 Say s3cr3t")], "opens no tunnel to model.test:443 .HTTP 403."),
    "302": ([b"HTTP/1.1 302 Found\r\nLocation: https://login.test/\r\n\r\n"], "HTTP 302"),
    "502 without an end": ([b"HTTP/1.1 502 Bad Gateway\r\n\r\nendless"], "HTTP 502"),
    "garbage": ([b"SSH-2.0-OpenSSH_9.2\r\n"], "no answer that is HTTP"),
    "TLS": ([b"\x15\x03\x03\x00\x02\x02\x28"], "no answer that is HTTP"),
    "its own request": ([b"HTTP/1.1 200 OK\r\nProxy-Authorization " + CREDENTIALS + b"\r\n\r\n"], "no answer"),
    "another protocol": ([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], "no answer that is HTTP"),
    "nothing": ([], "no answer that is HTTP"),
    "half a head": ([b"HTTP/1.1 200 OK\r\nX:"], "no answer that is HTTP"),
    "an endless head": ([b"HTTP/1.1 200 OK\r\n", *([b"X: " + b"x" * 10_000 + b"\r\n"] * 10)], "no answer that is HTTP"),
}


@pytest.mark.parametrize(("answer", "complaint"), REFUSALS.values(), ids=REFUSALS)
async def test_a_proxy_that_opens_no_tunnel(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate, answer: list[bytes], complaint: str
) -> None:
    async def refuse(server: ServerEnd) -> None:
        await server.request()
        await server.say(*answer)
        await server.aclose()

    network = ScriptedNetwork(nursery, refuse)
    transport = client_of(network, certificate)
    async with http(transport) as client:
        with pytest.raises(httpx.ConnectError, match=complaint) as refused:
            await client.get("https://model.test/")
        assert (network.open, transport.open_connections, len(network.clients)) == (0, 0, 1)
    assert "proxy.test:3128" in str(refused.value)
    assert all(secret not in str(refused.value) + repr(refused.value) for secret in SECRETS)


async def test_a_407_says_whether_there_were_credentials(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = ScriptedNetwork(nursery, answering(with_length(b"", status="407 Who")))
    connect = ProxyConnect({"https_proxy": "http://proxy.test"}, network, NO_TRUST)
    with pytest.raises(ConnectionError, match=r"proxy\.test:80 wants credentials"):
        await connect("model.test", 443, True)


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (OSError("Connection refused"), "Connection refused"),
        (UnicodeError("label too long"), "label too long"),
        (trio.BrokenResourceError(), "BrokenResourceError"),
    ],
)
@pytest.mark.parametrize("url", ["https://model.test/", "http://model.test/"])
async def test_no_way_to_the_proxy(
    autojump_clock: MockClock, certificate: Certificate, failure: Exception, text: str, url: str
) -> None:
    async def unreachable(host: str, port: int, tls: bool) -> trio.abc.Stream:
        raise failure

    async with http(client_of(unreachable, certificate)) as client:
        with pytest.raises(httpx.ConnectError, match=f"no connection to the proxy proxy.test:3128: {text}") as refused:
            await client.get(url)
    assert all(secret not in said for secret in SECRETS for said in texts_of(refused.value))


async def test_the_certificate_in_a_tunnel_is_to_be_the_servers(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    network = ScriptedNetwork(nursery, tunnelling(certificate, answering(HELLO)))
    async with http(client_of(network, certificate)) as client:
        with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
            await client.get("https://stranger.test/")
    assert network.open == 0


async def test_a_tunnel_that_the_proxy_closed_while_idle_is_not_reused(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    network = ScriptedNetwork(nursery, tunnelling(certificate, answering(HELLO)), watching=True)
    async with http(client_of(network, certificate)) as client:
        await client.get("https://model.test/")
        await network.servers[0].aclose()
        await client.get("https://model.test/")
        assert ([end.closed for end in network.clients], len(network.servers)) == ([True, False], 2)


async def slowly_tunnelled(certificate: Certificate, server: ServerEnd) -> None:
    """Something happens at every second: the proxy's answer in two parts, the handshake, the model's in three."""

    async def model(end: ServerEnd) -> None:
        await end.request()
        await trio.sleep(1)
        await end.say(chunked_head(), chunk(b"a"), chunk(b""))
        await end.wait_client_closed()

    await server.request()
    await trio.sleep(1)
    await server.say(ESTABLISHED[:20], ESTABLISHED[20:])
    secured = trio.SSLStream(server.stream, certificate.server_context(), server_side=True, https_compatible=True)
    await trio.sleep(1)
    await model(ServerEnd(secured, server.address))


@pytest.mark.parametrize("moment", [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5])
async def test_cancelling_a_request_through_a_tunnel_closes_it_at_that_instant(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate, moment: float
) -> None:
    network = ScriptedNetwork(nursery, partial(slowly_tunnelled, certificate), delay=1)
    transport = client_of(network, certificate)
    async with http(transport) as client:
        with trio.move_on_after(moment) as scope:
            await client.get("https://model.test/")
        assert scope.cancelled_caught
        assert (trio.current_time(), network.open, transport.open_connections) == (moment, 0, 0)
        assert (await client.get("https://model.test/")).content == b"a"
    assert network.open == 0


@pytest.mark.parametrize("seed", range(10))
async def test_x1_cancelling_at_the_instant_of_an_event_leaves_no_tunnel(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate, seed: int
) -> None:
    async def cancelled_request() -> None:
        with trio.move_on_after(chance.randrange(10)):
            await client.get("https://model.test/")

    trio._core._run._r.seed(seed)
    chance = random.Random(seed)
    network = ScriptedNetwork(nursery, partial(slowly_tunnelled, certificate), delay=1)
    transport = client_of(network, certificate)
    async with http(transport) as client:
        async with trio.open_nursery() as requests:
            for _ in range(20):
                requests.start_soon(cancelled_request)
                await trio.sleep(chance.randrange(2))
        assert (transport.open_connections, network.open) == (0, transport.idle_connections)
    assert network.open == 0


async def test_an_http_request_names_its_whole_url_to_the_proxy(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with http(client_of(network, certificate)) as client:
        for _ in range(2):
            await client.post("http://model.test/v1/chat?a=b%20c", content=b"{}", headers={"X-Key": "k"})
        await client.get("http://model.test:8080/")
        await client.get("http://[2001:db8::1]/")
    assert {server.address for server in network.servers} == {("proxy.test", 3128, False)}
    [first, _], [port], [address] = (server.requests for server in network.servers)
    assert (first.head.method, first.head.target) == (b"POST", b"http://model.test/v1/chat?a=b%20c")
    assert first.body == b"{}"
    assert [value for name, value in first.head.headers if name in (b"host", b"proxy-authorization", b"x-key")] == [
        b"model.test",
        b"k",
        CREDENTIALS,
    ]
    assert (port.head.target, address.head.target) == (b"http://model.test:8080/", b"http://[2001:db8::1]/")
    assert (network.open, [client.writes for client in network.clients]) == (0, [2, 1, 1])


async def test_a_forwarding_proxy_that_closed_while_idle_is_noticed(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO), watching=True)
    async with http(client_of(network, certificate)) as client:
        await client.get("http://model.test/")
        await network.servers[0].aclose()
        await client.get("http://model.test/")
        assert [end.writes for end in network.clients] == [1, 1]


async def test_a_forwarding_proxy_hands_tokens_on_as_they_come(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    async def proxy(server: ServerEnd) -> None:
        await server.request()
        await server.say(chunked_head(), chunk(b"a") + chunk(b"b"), chunk(b"c") + chunk(b""))

    async with (
        http(client_of(ScriptedNetwork(nursery, proxy), certificate)) as client,
        client.stream("GET", "http://model.test/") as response,
    ):
        assert await receive_all(response) == [b"ab", b"c"]


async def test_a_forwarding_proxy_that_wants_credentials(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    network = ScriptedNetwork(nursery, answering(HELLO, with_length(b"endless"[:3], status="407 Say s3cr3t")))
    transport = client_of(network, certificate)
    async with http(transport) as client:
        await client.get("http://model.test/")
        with pytest.raises(httpx.ConnectError, match="HTTP 407") as refused:
            await client.get("http://model.test/")
        assert (network.open, transport.open_connections, len(network.clients)) == (0, 0, 1)
    assert all(secret not in said for secret in SECRETS for said in texts_of(refused.value))


@pytest.mark.parametrize("moment", [0.5, 1.5, 2.5])
async def test_cancelling_a_forwarded_request_closes_it_at_that_instant(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate, moment: float
) -> None:
    async def proxy(server: ServerEnd) -> None:
        await server.request()
        await trio.sleep(1)
        await server.say(chunked_head(), chunk(b"a"), chunk(b""))

    network = ScriptedNetwork(nursery, proxy, delay=1)
    async with http(client_of(network, certificate)) as client:
        with trio.move_on_after(moment) as scope:
            await client.get("http://model.test/")
        assert scope.cancelled_caught
        assert (trio.current_time(), network.open) == (moment, 0)


@pytest.mark.parametrize("url", ["https://model.test/v1", "http://model.test/v1"])
async def test_what_a_run_hears_of_a_proxy_that_refuses(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate, url: str
) -> None:
    pieces: list[Piece] = []
    network = ScriptedNetwork(nursery, answering(with_length(b"", status="407 Say s3cr3t")))
    async with http(client_of(network, certificate)) as client:
        request = VendorRequest(url=url, headers={"Authorization": "Bearer k3y"}, content=b"{}")
        with pytest.raises(ProviderError, match=r"no connection to the model \(the proxy .*HTTP 407") as refused:
            await stream_answer(client, request, ChatDecoder(), pieces.extend)
    assert refused.value.code == "upstream.connection"
    assert network.servers[0].address == ("proxy.test", 3128, False)
    assert all(secret not in said for secret in (*SECRETS, "k3y") for said in texts_of(refused.value))
    assert network.open == 0


async def test_without_an_environment_there_is_no_proxy(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, PROXY)
    network = ScriptedNetwork(nursery, answering(HELLO))
    async with open_client(network) as client:
        await client.get("http://model.test/")
    async with open_client(network, {}) as client:
        await client.get("http://model.test/")
    assert [server.address for server in network.servers] == [("model.test", 80, False)] * 2


async def test_a_proxy_reached_by_tls_of_its_own(
    nursery: trio.Nursery, autojump_clock: MockClock, certificate: Certificate
) -> None:
    async def connect(host: str, port: int, tls: bool) -> trio.abc.Stream:
        stream = await network(host, port, tls)
        return await open_tls(stream, certificate.trusting_context(), host) if tls else stream

    async def serve(server: ServerEnd) -> None:
        secured = trio.SSLStream(server.stream, certificate.server_context(), server_side=True, https_compatible=True)
        end = ServerEnd(secured, server.address)
        ends.append(end)
        await scripts.pop(0)(end)

    ends: list[ServerEnd] = []
    scripts = [tunnelling(certificate, answering(HELLO)), answering(HELLO)]
    network = ScriptedNetwork(nursery, serve)
    environment = {"all_proxy": PROXY.replace("http:", "https:")}
    async with http(client_of(connect, certificate, environment)) as client:
        for url in ("https://model.test/", "http://model.test/"):
            assert (await client.get(url)).content == b"hello"
    assert [server.address for server in network.servers] == [("proxy.test", 3128, True)] * 2
    assert [end.requests[0].head.target for end in ends] == [b"model.test:443", b"http://model.test/"]
    assert network.open == 0


class LoopbackProxy:
    """Opens tunnels on a real socket, all of them to ``target``, whatever name the client asked for."""

    def __init__(self, listener: trio.SocketListener, certificate: Certificate | None, target: LoopbackServer) -> None:
        self.asked_for: list[bytes] = []
        self.port = listener.socket.getsockname()[1]
        self._context = certificate.server_context() if certificate else None
        self._target = target

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection to its end."""
        if self._context:
            stream = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
        try:
            async with stream:
                if connect := await ServerEnd(stream, ("", self.port, False)).request():
                    self.asked_for.append(connect.head.target)
                    await self._tunnel(stream)
        except trio.BrokenResourceError:
            pass

    async def _tunnel(self, stream: trio.abc.Stream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", self._target.port) as server:
            await stream.send_all(ESTABLISHED)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, stream, server, nursery.cancel_scope)
                nursery.start_soon(self._pump, server, stream, nursery.cancel_scope)

    @staticmethod
    async def _pump(source: trio.abc.Stream, sink: trio.abc.Stream, tunnel: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some():
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass
        tunnel.cancel()


@pytest.fixture
async def tls_model(nursery: trio.Nursery, certificate: Certificate) -> LoopbackServer:
    return await serve_on_loopback(nursery, certificate)


@pytest.fixture(params=["http", "https"])
async def loopback_proxy(
    request: pytest.FixtureRequest, nursery: trio.Nursery, certificate: Certificate, tls_model: LoopbackServer
) -> tuple[LoopbackProxy, dict[str, str]]:
    """The proxy, and the environment that names it."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy = LoopbackProxy(listener, certificate if request.param == "https" else None, tls_model)
    nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
    return proxy, {"HTTPS_PROXY": f"{request.param}://ada:pw@localhost:{proxy.port}"}


async def test_loopback_a_model_behind_a_real_proxy(
    loopback_proxy: tuple[LoopbackProxy, dict[str, str]], tls_model: LoopbackServer, certificate: Certificate
) -> None:
    proxy, environment = loopback_proxy
    transport = client_of(TcpConnect(certificate.trusting_context()), certificate, environment)
    async with http(transport) as client:
        for _ in range(3):
            assert (await client.get("https://model.test/")).content == b"hello"
            async with client.stream("POST", "https://model.test/", content=b"{}") as response:
                assert b"".join(await receive_all(response)) == b"token" * 5
        with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
            await client.get("https://stranger.test/")
    assert proxy.asked_for == [b"model.test:443", b"stranger.test:443"]
    assert tls_model.connections == 2


async def test_loopback_100_random_cancellations_leave_no_descriptor(
    loopback_proxy: tuple[LoopbackProxy, dict[str, str]], certificate: Certificate
) -> None:
    async def cancelled_request() -> None:
        with trio.move_on_after(chance.random() * 0.05):
            async with client.stream("POST", "https://model.test/", content=b"{}") as response:
                await receive_all(response)

    _, environment = loopback_proxy
    chance = random.Random(7)
    before = open_descriptors()
    transport = client_of(TcpConnect(certificate.trusting_context()), certificate, environment)
    async with http(transport) as client:
        async with trio.open_nursery() as requests:
            for _ in range(100):
                requests.start_soon(cancelled_request)
                await trio.sleep(0.002)
        assert transport.open_connections == 0
        assert (await client.post("https://model.test/")).content == b"token" * 5
    await wait_descriptors(before)
