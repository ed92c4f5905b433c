"""What a server without keys checks instead: where it listens, by which name it is asked, and from which page.

Such a server trusts whoever reaches it, so only this machine may reach it. A web page in a browser on this machine is
not the user: by DNS rebinding a page's own host name can become 127.0.0.1, but the ``Host`` header still tells it; and
a page may send requests whose answers it cannot read, but the browser adds ``Origin`` or ``Sec-Fetch-Site``. With keys
none of this is checked: no browser sends a key that the page does not know.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Awaitable, Callable, Collection
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from quart import Request, Response, Websocket, request, websocket
from quart_trio import QuartTrio

from .asked import Asked
from .cors import Cors
from .errors import ApiError

LOCALHOST = "localhost"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.IGNORECASE)


class BindingRefusedError(ValueError):
    """The address would let others in, and there are no keys to tell them apart."""


def check_binding(host: str, keyed: bool) -> None:
    """Refuse an address to listen on that is not loopback, unless the server has keys.

    Raises:
        BindingRefusedError: the text says why and what to do.
        OSError: the name has no address.
    """
    if keyed:
        return
    reachable = sorted(address for address in _addresses(host) if not is_loopback_address(address))
    if reachable:
        shown = host if host in reachable else f"{host or 'an empty host'} ({', '.join(reachable)})"
        raise BindingRefusedError(
            f"{shown} can be reached from other machines, and without API keys whoever reaches the server may do "
            "everything: make a key first (lumos keys create --tenant TENANT --user USER --admin), "
            "or listen on 127.0.0.1"
        )


def _addresses(host: str) -> set[str]:
    """What ``sockets.listen_tcp`` would bind. A last dot, and brackets, are not what a resolver knows."""
    name = host.removeprefix("[").removesuffix("]").removesuffix(".")
    found = socket.getaddrinfo(name or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return {str(address[0]) for *_, address in found}


def is_loopback_address(text: str) -> bool:
    """Whether the text is an address of this machine alone: 127.0.0.0/8, ::1, and the former written as IPv6."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


@lru_cache(maxsize=64)
def is_loopback_host(host: str) -> bool:
    """Whether a ``Host`` header names this machine alone: localhost, a name under it, or a loopback address."""
    match = _HOST.fullmatch(host)
    if not match:
        return False
    name = match["name"].lower()
    if name.startswith("["):
        return is_loopback_address(name[1:-1])
    plain = name.removesuffix(".")
    return plain == LOCALHOST or plain.endswith(f".{LOCALHOST}") or is_loopback_address(name)


class RequestGuard:
    """Checks every request of an app before its route does, and answers browsers' CORS questions.

    Attributes:
        cors: the origins whose pages may read answers, and so also may send requests.
    """

    def __init__(
        self, is_keyed: Callable[[], Awaitable[bool]], cors: Cors | None = None, hosts: Collection[str] = ()
    ) -> None:
        """``hosts`` are further ``Host`` headers, with their port, that count as this machine."""
        self.cors = cors or Cors()
        self._is_keyed = is_keyed
        self._hosts = frozenset(hosts)

    def install(self, app: QuartTrio) -> None:
        """Stand before every route of the app, also before those there are not."""

        async def before() -> Response | None:
            await self.check(request)
            return self.cors.answer_preflight(request)

        async def after(response: Response) -> Response:
            self.cors.mark(request, response)
            return response

        async def before_socket() -> None:
            await self.check(websocket)

        app.before_request(before)
        app.before_websocket(before_socket)
        app.after_request(after)

    async def check(self, asked: Asked | Websocket) -> None:
        """Refuse what a web page elsewhere may have sent, while the server has no keys.

        Raises:
            ApiError: 421 for another ``Host``, 403 for another origin, 503 while the store cannot tell about keys.
        """
        refusal = self._host_refusal(asked) or self._origin_refusal(asked)
        if refusal is not None and not await self._is_keyed():
            raise refusal

    def _host_refusal(self, asked: Asked | Websocket) -> ApiError | None:
        hosts = asked.headers.getlist("Host")
        if len(hosts) == 1 and (is_loopback_host(hosts[0]) or hosts[0] in self._hosts):
            return None
        message = "without API keys this server answers to localhost, 127.0.0.1 and [::1] only; see the Host header"
        return ApiError(421, "MISDIRECTED_REQUEST", message)

    def _origin_refusal(self, asked: Asked | Websocket) -> ApiError | None:
        if asked.method in SAFE_METHODS and isinstance(asked, Request):  # what a page opens a socket to, it reads too
            return None
        origins = asked.headers.getlist("Origin")
        if origins:
            host = asked.headers.get("Host", "").lower()
            own = {f"http://{host}", f"https://{host}"}
            fine = all(origin in own or self.cors.allows(origin) for origin in origins)
        else:
            fine = asked.headers.get("Sec-Fetch-Site", "none") in {"none", "same-origin"}
        message = "a page of another origin may not do this; allow it with --cors-origin"
        return None if fine else ApiError(403, "FORBIDDEN", message)
