"""Hypercorn's HTTP/1.1 with the cures it needs: what is refused, and how answers end."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

import h11
import trio
from hypercorn.events import Closed, Event
from hypercorn.protocol.events import Body, Request, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.ws_stream import WSStream

from .direct import CLEANUP_SECONDS
from .errors import RETRY_AFTER_SECONDS, bare_refusal
from .websocket_protocol import GuardedWSStream, handshake_headers, is_upgrade

_TARGET = re.compile(rb"/|\*$|https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d*)?([/?]|$)", re.IGNORECASE)
"""What a request may ask for (RFC 9112, section 3.2): a path, ``*`` or a URL. On other targets Quart crashes."""

_HOST = re.compile(rb"(\[[\da-f:.]+\]|[\w-]+(\.[\w-]+)*\.?)?(:\d*)?", re.IGNORECASE)
"""What a Host header may say (RFC 9110, section 7.2). On others, as ``.``, Werkzeug raises before our routes."""

_UNANSWERED = [(b"content-length", b"0"), (b"connection", b"close")]
"""The headers of Hypercorn's own 500: the app's task has ended without a word, as it does when serving ends."""

_CUT_OFF_BODY = bare_refusal("the server is shutting down")


class Http11(H11Protocol):
    """Hypercorn's HTTP/1.1 without the ways into cleartext HTTP/2: no browser uses them, seven of H1's inputs do."""

    _asked_head = False

    async def handle(self, event: Event) -> None:
        """Take what comes from the connection."""
        await super().handle(event)
        if isinstance(self.stream, WSStream) and self.stream.closed:
            await self.send(Closed())  # refused with a 400, after which Hypercorn would wait for the client

    async def stream_send(self, event: StreamEvent) -> None:
        """Pass on what the app says; an answer to a body that is still to come is the connection's last, and says so.

        Without, Hypercorn only closes it, and the next request of a client that keeps connections finds it dead.
        """
        if isinstance(event, Response):
            if event.status_code == 500 and event.headers == _UNANSWERED:
                await self._answer_cut_off(event)
                return
            if event.status_code >= 200 and self.connection.their_state is h11.SEND_BODY:
                event = replace(event, headers=[*event.headers, (b"connection", b"close")])
            event = replace(event, headers=_true_headers(event, self._asked_head))
        await super().stream_send(event)

    async def _answer_cut_off(self, event: Response) -> None:
        """A request that still waited when serving ended gets a 503 instead of an empty 500. Its end comes behind."""
        headers = [
            (b"content-type", b"application/json"),
            (b"cache-control", b"no-store"),
            (b"retry-after", b"%d" % RETRY_AFTER_SECONDS),
            (b"content-length", b"%d" % len(_CUT_OFF_BODY)),
            (b"connection", b"close"),
        ]
        with trio.move_on_after(CLEANUP_SECONDS, shield=True):  # the task that brings this is cancelled
            await super().stream_send(replace(event, status_code=503, headers=headers))
            if not self._asked_head:
                await super().stream_send(Body(STREAM_ID, _CUT_OFF_BODY))

    async def _check_protocol(self, event: h11.Request) -> None:
        """Stay with HTTP/1.1."""

    async def _create_stream(self, request: h11.Request) -> None:
        self._asked_head = request.method == b"HEAD"
        hosts = (value for name, value in request.headers if name == b"host")
        if not (_TARGET.match(request.target) and all(map(_HOST.fullmatch, hosts))):
            await self._refuse()
        elif not is_upgrade(request):
            await super()._create_stream(request)
        elif (headers := handshake_headers(request)) is None:
            await self._refuse()
        else:
            await self._create_socket(request, headers)

    async def _refuse(self) -> None:
        await self._send_error_response(400)
        await self.send(Closed())

    async def _create_socket(self, request: h11.Request, headers: list[tuple[bytes, bytes]]) -> None:
        """As Hypercorn's, with a stream of ours."""
        self.stream = GuardedWSStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        self.connection = H11WSConnection(cast(h11.Connection, self.connection))
        version = request.http_version.decode()
        await self.stream.handle(Request(STREAM_ID, headers, version, "GET", request.target, self.connection_state))


def _true_headers(answer: Response, asked_head: bool) -> list[tuple[bytes, bytes]]:
    """The answer's headers without what is not true where there is no body (RFC 9110, section 8.6).

    Quart gives every empty answer a length of 0. A 204 must not tell one; a 304 and an answer to HEAD may only tell
    what a GET would have had, and no GET that is answered with 200 has nothing.
    """
    if answer.status_code in {204, 304}:
        untrue = {b"content-length", b"content-type"}
        return [(name, value) for name, value in answer.headers if name.lower() not in untrue]
    if asked_head and answer.status_code == 200:
        return [(name, value) for name, value in answer.headers if (name.lower(), value) != (b"content-length", b"0")]
    return list(answer.headers)
