"""A headless Chromium that opens one page, and the page's own server, which hears what the page has to tell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

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
)


class Seen(msgspec.Struct):
    """What the page has: pairs of id and event, how often its stream was opened, and how it stands."""

    events: list[tuple[str, dict[str, Any]]] = []
    state: str = ""
    opened: int = 0

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


class Browser:
    """Opens pages. Their origin is known before."""

    def __init__(self, folder: Path, origin: str, page: Page) -> None:
        self.origin = origin
        self._folder = folder
        self._page = page

    @asynccontextmanager
    async def open(self, way: str, url: str) -> AsyncIterator[Page]:
        """The page, reading the events there in that way; closed after the block."""
        address = f"{self.origin}/?{urlencode({'way': way, 'url': url})}"
        command = [find_chromium(), *_FLAGS, f"--user-data-dir={self._folder}", address]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"HOME": str(self._folder)}
        async with trio.open_nursery() as nursery:
            run: Any = partial(
                trio.run_process,
                command,
                check=False,
                capture_stdout=False,
                start_new_session=True,
                env=environment,
                **quiet,
            )
            process = await nursery.start(run)
            try:
                yield self._page
            finally:
                os.killpg(process.pid, 9)


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """A browser whose page is served here."""
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
        yield Browser(folder, base_url(listeners[0]), page)
        nursery.cancel_scope.cancel()
