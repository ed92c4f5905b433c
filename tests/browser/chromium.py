"""A headless Chromium that opens pages, and a page's own server, which hears what the page has to tell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio

from server.compose import base_url
from server.serving import serve
from server.sockets import listen_tcp

PAGE = Path(__file__).with_name("page.html")
TELLING_SECONDS = 30.0

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--remote-debugging-port=0",
)
_READY = b"DevTools listening on ws://"


class Seen(msgspec.Struct):
    """What the page has: pairs of id and event, how often its stream was opened, how it stands, what was agreed on."""

    events: list[tuple[str, dict[str, Any]]] = []
    state: str = ""
    opened: int = 0
    protocol: str = ""

    @property
    def text(self) -> str:
        return "".join(event["content"] for _, event in self.events if event["chunk_type"] == "content")


class Page:
    """An open page; ``seen`` is what it told last."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._told = trio.Event()

    def hear(self, seen: Seen) -> None:
        self.seen = seen
        self._told.set()
        self._told = trio.Event()

    async def wait(self, condition: Callable[[Seen], bool]) -> Seen:
        """What it has, once it fits."""
        with trio.move_on_after(TELLING_SECONDS):  # noqa: ASYNC912 - may be there already
            while not condition(self.seen):
                await self._told.wait()
            return self.seen
        raise AssertionError(f"the page has only {self.seen}")


def find_chromium() -> str:
    """The program.

    Raises:
        FileNotFoundError: Chromium is not installed.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (program := shutil.which(name)) is not None:
            return program
    raise FileNotFoundError("these tests need Chromium: apt-get install chromium (.ci/run does so)")


class Chromium:
    """A running Chromium; ``address`` is where it takes commands, as the DevTools protocol's HTTP side says."""

    def __init__(self, address: str) -> None:
        self.address = address


@contextmanager
def run_chromium(folder: Path) -> Iterator[Chromium]:
    """A Chromium with its profile in that folder; killed after the block.

    Raises:
        FileNotFoundError: as ``find_chromium``.
    """
    command = [find_chromium(), *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    environment = os.environ | {"HOME": str(folder)}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )
    assert process.stderr is not None
    try:
        with process.stderr as said:
            ready = next((line for line in said if line.startswith(_READY)), None)
        assert ready is not None, "Chromium does not start"
        yield Chromium("http://" + ready.removeprefix(_READY).partition(b"/")[0].decode())
    finally:
        os.killpg(process.pid, 9)
        process.wait()


class Browser:
    """Opens pages. Their origin is known before."""

    def __init__(self, chromium: Chromium, client: httpx.AsyncClient, origin: str, page: Page) -> None:
        self.origin = origin
        self._commands = f"{chromium.address}/json"
        self._client = client
        self._page = page

    @asynccontextmanager
    async def open(self, way: str, url: str) -> AsyncIterator[Page]:
        """The page, reading the events there in that way; closed after the block."""
        address = f"{self.origin}/?{urlencode({'way': way, 'url': url})}"
        opened = await self._client.put(f"{self._commands}/new?{quote(address, safe='')}")
        yield self._page
        await self._client.get(f"{self._commands}/close/{opened.json()['id']}")


@asynccontextmanager
async def serve_page(chromium: Chromium, client: httpx.AsyncClient) -> AsyncIterator[Browser]:
    """The browser with a page that is served here."""
    page = Page()
    app = QuartTrio("page", static_folder=None)

    @app.get("/")
    async def get_page() -> Response:
        return Response(PAGE.read_bytes(), content_type="text/html")

    @app.post("/report")
    async def report() -> Response:
        page.hear(msgspec.json.decode(await request.get_data(), type=Seen))
        return Response(b"", status=204)

    listeners = listen_tcp("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, app, listeners, trio.Event())
        yield Browser(chromium, client, base_url(listeners[0]), page)
        nursery.cancel_scope.cancel()
