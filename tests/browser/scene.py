"""A ``lumos serve`` that a page in a real Chromium uses, and that is started again at the same address."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from providers.http import open_client
from providers.recording import Recording
from server.compose import base_url
from server.serving import serve
from server.sockets import listen_tcp
from tests.browser.chromium import Browser, Chromium, Seen, serve_page
from tests.harness.recordings import steady_recording
from tests.harness.vendor import VendorServer
from tests.server.commands import agent_at, write_agents
from tests.server.test_compose import COMMAND, ROOT, ServeProcess

TERMINAL = {"done", "error", "stop"}
QUICK = steady_recording(first=0.1, gap=0.05, last=1.0)
ENDLESS = steady_recording(first=0.1, gap=0.1, last=80.0)


class Restarting:
    """A ``lumos serve`` that is started again at the same address, with the same database."""

    def __init__(self, nursery: trio.Nursery, client: httpx.AsyncClient, arguments: list[str], url: str) -> None:
        self.url = url
        self._nursery = nursery
        self._client = client
        self._arguments = arguments

    async def start(self) -> None:
        environment = os.environ | {"no_proxy": "*"}
        run: Any = partial(
            trio.run_process, self._arguments, stderr=subprocess.PIPE, check=False, cwd=ROOT, env=environment
        )
        self.process = ServeProcess(await self._nursery.start(run))
        self._nursery.start_soon(self.process.collect_output)
        await self.process.wait_line("server.started")

    async def end(self, signum: int) -> None:
        self.process.process.send_signal(signum)
        await self.process.wait_exit()

    async def start_run(self) -> str:
        """Its id. It goes on without readers."""
        url = f"{self.url}/api/v1/agents/local/chat/lumosai/stream"
        body = {"message": "hi", "on_disconnect": "continue"}
        async with self._client.stream("POST", url, json=body) as response:
            assert response.status_code == 200
            return str(response.headers["X-Run-Id"])

    def events_url(self, run_id: str) -> str:
        return f"{self.url}/api/v1/runs/{run_id}/events"


@asynccontextmanager
async def restarting(
    folder: Path, recording: Recording, chromium: Chromium
) -> AsyncIterator[tuple[Restarting, Browser]]:
    """The server, whose agent ``local`` says what is recorded, and the browser, whose pages it lets in."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    models = listen_tcp("127.0.0.1", 0)
    agents = write_agents(folder, agent_at(base_url(models[0])))
    async with trio.open_nursery() as nursery, open_client() as client, serve_page(chromium, client) as browser:
        await nursery.start(serve, VendorServer(recording).app(), models, trio.Event())
        options = ["--agents", str(agents), "--database-url", f"sqlite:///{folder}/lumos.db"]
        command = [*COMMAND, "--port", str(port), "--cors-origin", browser.origin, *options]
        lumos = Restarting(nursery, client, command, f"http://127.0.0.1:{port}")
        await lumos.start()
        yield lumos, browser
        nursery.cancel_scope.cancel()


def check_sequence(seen: Seen, run_id: str) -> None:
    """Numbers of this run that only grow, and exactly one terminal event, at the end."""
    numbers = []
    for event_id, _ in seen.events:
        of, _, number = event_id.rpartition(".")
        assert of == run_id
        numbers.append(int(number))
    kinds = [event["chunk_type"] for _, event in seen.events]
    assert numbers == sorted(set(numbers))
    assert numbers[:-1] == list(range(1, len(numbers)))
    assert kinds[0] == "start"
    assert [kind in TERMINAL for kind in kinds] == [False] * (len(kinds) - 1) + [True]


def is_closed(seen: Seen) -> bool:
    return seen.state == "closed"
