"""The WebSocket: its handshake, then a session. ``docs/socket.md`` describes what is said on it."""

from __future__ import annotations

from typing import cast

import structlog
from quart import websocket
from quart_trio import QuartTrio

from .errors import ApiError
from .principal import LOCAL_USER, Principal
from .routing import API, read_query
from .services import Services
from .socket_session import Socket, SocketSession
from .websocket_protocol import JoiningConnection

PATH = f"{API}/ws"
SUBPROTOCOL = "lumos.v1"
KEY_SUBPROTOCOL = "lumos.key."
"""A browser's page can set no header of a handshake but this one; the key in the address would end up in logs."""

INTERNAL_ERROR = 1011

_logger = structlog.get_logger("lumos")


def install_socket(app: QuartTrio, services: Services) -> None:
    """Serve the WebSocket."""

    async def socket() -> None:
        caller = await _admitted(services)
        await websocket.accept(subprotocol=SUBPROTOCOL)
        try:
            await SocketSession(cast(Socket, websocket), services, caller).run()
        except* Exception as bugs:
            _logger.error("socket.crashed", exc_info=bugs)
            await websocket.close(INTERNAL_ERROR)

    app.asgi_websocket_class = JoiningConnection
    app.add_websocket(PATH, "socket", socket)


async def _admitted(services: Services) -> Principal:
    """Who opens the socket.

    Raises:
        ApiError: 400 without the subprotocol, 422 for a query, and as ``Gatekeeper.admit``.
    """
    read_query(websocket, None)
    offered = websocket.requested_subprotocols
    if SUBPROTOCOL not in offered:
        raise ApiError(400, "SUBPROTOCOL_REQUIRED", f"offer the subprotocol {SUBPROTOCOL}")
    if services.gatekeeper is None:
        return LOCAL_USER
    keys = (name.removeprefix(KEY_SUBPROTOCOL) for name in offered if name.startswith(KEY_SUBPROTOCOL))
    return await services.gatekeeper.admit(websocket, *keys)
