"""The proxies that the environment names: ``http_proxy``, ``https_proxy``, ``all_proxy``, and ``no_proxy``.

Nobody has standardised these variables. Where clients differ, this does as curl does: a name in lower case goes before
the same in upper case; ``HTTP_PROXY`` is not read at all, because a CGI server makes it from a header that any client
may send (httpoxy.org); ``all_proxy`` is for what has no proxy of its own; a name in ``no_proxy`` stands for its
subdomains too, with or without a dot before it. It differs from curl where others do better:

- Loopback addresses and ``localhost`` never go through a proxy, as in Go and Chromium (in curl and httpx they do). A
  proxy elsewhere would look for the model on its own machine, and would be handed the request on the way.
- An entry of ``no_proxy`` may have a port, as in Go and urllib, and ``*`` may stand among others or before a dot.
- A proxy's port is by default that of its scheme, not 1080.

An https server is reached through a tunnel (CONNECT) with TLS inside, an http server by requests that name the whole
URL: Squid and Apache as they come refuse a tunnel to any port but 443 (and 563). SOCKS is not supported.
"""

from __future__ import annotations

import re
import ssl
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

import h11
import httpx
import trio

from .connection import Connection
from .network import Connect, NetworkConfigError, Trust, is_readable, open_tls, read_into
from .tcp import Take

_VARIABLES = {
    "http": ("http_proxy", "all_proxy", "ALL_PROXY"),
    "https": ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
}
_BYPASS = ("no_proxy", "NO_PROXY")
_PORTS = {"http": 80, "https": 443}
_HOST_AND_PORT = re.compile(r"(\[.+\]|[^:]+):([0-9]{1,5})")


class ProxyConnect:
    """A ``Connect`` that goes through the proxies of ``environment``, by ``inner``, and past them by ``inner`` alone.

    The environment is read here and never again. What is in the tunnels is trusted by ``ssl_context``, or as
    ``Trust()`` does.

    Raises:
        NetworkConfigError: a variable names no http or https proxy, or a SOCKS proxy.
    """

    def __init__(
        self, environment: Mapping[str, str], inner: Connect, ssl_context: ssl.SSLContext | Trust | None = None
    ) -> None:
        self._inner = inner
        self._bypass = Bypass(_first_set(environment, _BYPASS)[1])
        self._proxies = {scheme: proxy for scheme in _VARIABLES if (proxy := _find_proxy(environment, scheme))}
        self._trust = Trust.of(ssl_context)

    async def __call__(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        """Connect as ``Connect`` says; a failure or a cancellation leaves nothing open.

        Raises:
            ConnectionError: no way to the proxy, or it refuses; an ``OSError`` as ``Connect`` wants it.
        """
        proxy = self._proxies.get("https" if tls else "http")
        if proxy is None or self._bypass.covers(host, port):
            return await self._inner(host, port, tls)
        context = await self._trust.context() if tls else None
        stream = await self._reach(proxy)
        if context is None:
            return ForwardingStream(stream, proxy, _authority(host, port, default_port=80))
        try:
            received = await _open_tunnel(stream, proxy, _authority(host, port))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return await open_tls(stream, context, host, received)

    async def _reach(self, proxy: Proxy) -> trio.abc.Stream:
        try:
            return await self._inner(proxy.host, proxy.port, proxy.tls)
        except (OSError, UnicodeError, trio.BrokenResourceError) as exc:
            raise ConnectionError(f"no connection to the proxy {proxy}: {str(exc) or repr(exc)}") from exc


class ForwardingStream(trio.abc.Stream):
    """A connection to a proxy, for http requests to one server (``connection.Forwarding``)."""

    def __init__(self, stream: trio.abc.Stream, proxy: Proxy, authority: str) -> None:
        self._stream = stream
        self._origin = f"http://{authority}".encode("ascii")
        self._proxy = proxy

    def forwarded(self, head: h11.Request) -> h11.Request:
        """The head with the whole URL as its target (RFC 9112, section 3.2.2), and the proxy's credentials."""
        return h11.Request(
            method=head.method,
            target=self._origin + head.target,
            headers=[*head.headers.raw_items(), *self._proxy.headers],
        )

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the connection may take more."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive."""
        return await self._stream.receive_some(max_bytes)

    async def read_into(self, take: Take) -> None:
        """As the stream's."""
        await read_into(self._stream, take)

    def is_readable(self) -> bool:
        """Whether a read would return at once; see ``network.Readable``."""
        return is_readable(self._stream)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()


@dataclass(frozen=True)
class Proxy:
    """A proxy's address and what it is to be told; ``str()`` and ``repr`` leave the credentials out.

    Attributes:
        tls: whether the way to it is TLS too.
        headers: its credentials, if it has any.
    """

    host: str
    port: int
    tls: bool
    headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)

    def __str__(self) -> str:
        return _authority(self.host, self.port)


async def _open_tunnel(stream: trio.abc.Stream, proxy: Proxy, authority: str) -> bytes:
    """Ask the proxy for a tunnel; what came of the tunnel together with the proxy's answer.

    The proxy's own words do not get into the error: it was just sent the credentials, and may repeat them.
    """
    connection, target = Connection(stream), authority.encode("ascii")
    head = h11.Request(method="CONNECT", target=target, headers=[(b"Host", target), *proxy.headers])
    try:
        answer = await connection.request(head, b"", lambda: None)
    except httpx.TransportError as exc:
        raise ConnectionError(f"the proxy {proxy} gave no answer that is HTTP") from exc
    if answer.status_code == httpx.codes.PROXY_AUTHENTICATION_REQUIRED:
        raise ConnectionError(f"the proxy {proxy} wants {'other ' if proxy.headers else ''}credentials (HTTP 407)")
    if not httpx.codes.is_success(answer.status_code):
        raise ConnectionError(f"the proxy {proxy} opens no tunnel to {authority} (HTTP {answer.status_code})")
    return connection.leftover()


class _BypassEntry(NamedTuple):
    """An entry of ``no_proxy``. ``port`` is None for any."""

    name: str
    network: IPv4Network | IPv6Network | None
    port: int | None

    def covers(self, name: str, address: IPv4Address | IPv6Address | None, port: int) -> bool:
        if self.port not in (None, port):
            return False
        if self.name == "*":
            return True
        if address is not None:
            return self.network is not None and address in self.network
        return name == self.name or name.endswith(f".{self.name}")


class Bypass:
    """The hosts that go past the proxies: those that ``no_proxy`` lists, and this machine.

    Entries are separated by commas or blanks: a domain, an IP address, a network as ``10.0.0.0/8``, or ``*``, each with
    a port or without (an IPv6 address then in brackets). An address matches by its value, a name only as it is written:
    nothing is resolved. An entry that is none of these matches nothing: what others read there is not ours to refuse.
    """

    def __init__(self, listed: str) -> None:
        self._entries = [_parse_entry(entry) for entry in listed.lower().replace(",", " ").split()]

    def covers(self, host: str, port: int) -> bool:
        """Whether a connection there goes past the proxies."""
        name, address = host.lower().rstrip("."), _parse_address(host)
        if name == "localhost" or name.endswith(".localhost") or (address is not None and address.is_loopback):
            return True
        return any(entry.covers(name, address, port) for entry in self._entries)


def _parse_entry(entry: str) -> _BypassEntry:
    split = _HOST_AND_PORT.fullmatch(entry)
    host, port = (split[1], int(split[2])) if split else (entry, None)
    try:
        network = ip_network(host.strip("[]"), strict=False)
    except ValueError:
        network = None
    return _BypassEntry(host if host == "*" else host.removeprefix("*").strip("."), network, port)


def _parse_address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def _find_proxy(environment: Mapping[str, str], scheme: str) -> Proxy | None:
    variable, value = _first_set(environment, _VARIABLES[scheme])
    if not value:
        return None
    if value.lower().startswith("socks"):
        raise NetworkConfigError(
            f"{variable} names a SOCKS proxy, and {scheme} requests would go there: only http:// and https:// proxies"
            f" are supported, and {_VARIABLES[scheme][0]} can name one"
        )
    proxy = _parse_proxy(value)
    if proxy is None:
        raise NetworkConfigError(
            f"{variable} is not the URL of a proxy, as http://name:password@proxy.example:3128 (a name or password"
            " with special characters has to be percent-encoded)"
        )
    return proxy


def _first_set(environment: Mapping[str, str], variables: tuple[str, ...]) -> tuple[str, str]:
    """The first of the variables that is not empty, and its value; empty strings if there is none."""
    for variable in variables:
        if value := environment.get(variable, "").strip():
            return variable, value
    return "", ""


def _parse_proxy(text: str) -> Proxy | None:
    """The proxy; None if the text is no URL of one. A path would be the rest of a password with a slash in it."""
    try:
        url = httpx.URL(text if "://" in text else f"http://{text}")
    except (httpx.InvalidURL, UnicodeError):  # idna's errors are UnicodeErrors
        return None
    host = url.raw_host.decode("ascii")
    if url.scheme not in _PORTS or not host or "%" in host or url.raw_path != b"/" or url.fragment:
        return None
    port = _PORTS[url.scheme] if url.port is None else url.port
    if not 0 < port < 65_536:
        return None
    return Proxy(host, port, url.scheme == "https", _credentials(url))


def _credentials(url: httpx.URL) -> tuple[tuple[bytes, bytes], ...]:
    if not url.userinfo:
        return ()
    return ((b"Proxy-Authorization", b"Basic " + b64encode(f"{url.username}:{url.password}".encode())),)


def _authority(host: str, port: int, *, default_port: int | None = None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port == default_port else f"{name}:{port}"
