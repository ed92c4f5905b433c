"""A small app behind the real gatekeeper, guard and server, in virtual time; a store that counts its reads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, TypeVarTuple

import httpx
import trio
from quart import Response, request
from quart_trio import QuartTrio
from sqlalchemy import Connection

from engine import RunLog
from engine.events import AgentStarted, AgentStopped
from providers.http import open_client
from server.auth import Gatekeeper
from server.cors import Cors
from server.errors import install_error_handlers, json_response
from server.guard import RequestGuard
from server.keys import make_key
from server.principal import KeyLimits
from server.requests import read_json
from server.serving import serve
from server.sse import EventStreamBody, stream_response
from server.store import keys as key_rows
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.rows import StoredKey
from server.testing.memory_network import MemoryNetwork
from tests.server.raw_http import RawAnswer, RawClient

NOW = "2026-11-22T12:00:00.000000+00:00"
HOST = "localhost"
URL = f"http://{HOST}"

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class CountingStore:
    """A database in memory that writes down each read with its time.

    Attributes:
        down: whether it cannot answer.
        seconds: what an answer takes; what it says is from before.
    """

    def __init__(self) -> None:
        self.database = Database.open("sqlite://", inline=True)
        self.reads: list[tuple[str, float]] = []
        self.down = False
        self.seconds = 0.0

    async def read(self, query: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        self.reads.append((query.__name__, trio.current_time()))
        if self.down:
            raise StoreUnavailableError("it is down")
        answer = await self.database.read(query, *args)
        await trio.sleep(self.seconds)
        return answer

    async def add_key(
        self,
        tenant: str = "acme",
        user: str = "ada",
        *,
        admin: bool = False,
        limits: KeyLimits | None = None,
    ) -> tuple[StoredKey, str]:
        """A new key in the store, and its text."""
        key, text = make_key(tenant, user, admin, "", limits or KeyLimits(), NOW)
        await self.database.write(key_rows.create_key, key)
        return key, text

    async def revoke(self, key: StoredKey) -> None:
        assert await self.database.write(key_rows.revoke_key, key.key_id, NOW)


class Door:
    """The app's server and ways to ask it. ``changes`` counts the requests that would have changed something."""

    def __init__(self, store: CountingStore, network: MemoryNetwork, *, keyed: bool) -> None:
        self.store = store
        self.network = network
        self.changes = 0
        self.gatekeeper = Gatekeeper(store, keyed=keyed)
        self.client = open_client(network.connect)

    async def who(self, key: str | None = None, **headers: str) -> httpx.Response:
        """Ask who one is."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return await self.client.get(f"{URL}/who", headers=headers)

    async def raw(self, *headers: str, path: str = "/who", method: str = "GET", host: str = HOST) -> RawAnswer:
        """Ask with these header lines, as they are (latin-1)."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
        return await self.raw_bytes("\r\n".join(lines).encode("latin-1"))

    async def raw_bytes(self, request_bytes: bytes) -> RawAnswer:
        """Ask with these bytes on a connection of their own."""
        stream = await self.network.connect(HOST, 80)
        async with stream:
            return await RawClient(stream).ask(request_bytes)


@asynccontextmanager
async def open_door(*origins: str, keyed: bool = False) -> AsyncIterator[Door]:
    """The app, served at ``URL``; ``keyed`` is what its start found."""
    network = MemoryNetwork()
    store = CountingStore()
    async with trio.open_nursery() as nursery:
        door = Door(store, network, keyed=keyed)
        app = _app(door, RequestGuard(door.gatekeeper.is_keyed, Cors(origins, keyed=keyed)))
        await nursery.start(serve, app, [network.listen(HOST, 80)], trio.Event())
        yield door
        await door.client.aclose()
        nursery.cancel_scope.cancel()
    store.database.close()


def _app(door: Door, guard: RequestGuard) -> QuartTrio:
    app = QuartTrio("door", static_folder=None)
    install_error_handlers(app)
    guard.install(app)

    @app.get("/open")
    async def free() -> Response:
        return json_response({})

    @app.get("/who")
    async def who() -> Response:
        caller = await door.gatekeeper.admit(request)
        return json_response([caller.tenant_id, caller.user_id, caller.admin, caller.key_id])

    @app.route("/change", methods=["POST", "PUT", "DELETE"])
    async def change() -> Response:
        await door.gatekeeper.admit(request)
        door.changes += 1
        return json_response({})

    @app.post("/json")
    async def json() -> Response:
        await door.gatekeeper.admit(request)
        body: Any = await read_json(request, dict)
        door.changes += 1
        return json_response(body)

    @app.get("/stream")
    async def stream() -> Response:
        await door.gatekeeper.admit(request)
        log = RunLog("r")
        log.append(AgentStarted("a", "r", NOW))
        log.append(AgentStopped("requested", "", None))
        return stream_response(EventStreamBody(log, 0))

    return app
