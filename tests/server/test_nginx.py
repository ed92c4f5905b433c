"""Behind a real nginx with ``docs/deploy/nginx.conf``: what is cached, and that live streams pass as they come."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import trio

from engine import GenerationComplete, TextDelta
from providers.recording import Recording
from tests.harness.nginx import find_nginx, running_nginx, write_config
from tests.harness.recordings import steady_recording
from tests.server.test_compose import LONG, QUICK, STEADY, LiveAnswer, Site, site

API = "/api/v1"
SECRET = "--share-secret", "a secret of this test"


class Front(Site):
    """A site that is asked through nginx."""

    def __init__(self, lumos: Site, url: str) -> None:
        super().__init__(lumos.serve, lumos.vendor, lumos.client, url)
        self.behind = lumos

    async def ended_run(self) -> str:
        """The id of a run that has ended."""
        async with self.open_chat() as answer:
            assert isinstance(await answer.read_to_end(), GenerationComplete)
            return str(answer.response.headers["X-Run-Id"])

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(f"{self.url}{path}", headers=headers)

    async def share(self, run_id: str, seconds: int = 100) -> str:
        response = await self.client.post(f"{self.url}{API}/runs/{run_id}/share", json={"expires_in": seconds})
        url: str = response.json()["data"]["url"]
        with trio.fail_after(LONG):  # until the store has the run's end, some 250 ms, it is nothing for caches
            while "ETag" not in (await self.client.get(f"{self.behind.url}{url}")).headers:
                pass
        return url


@asynccontextmanager
async def front(
    folder: Path, *options: str, recording: Recording = QUICK, changes: tuple[tuple[str, str], ...] = ()
) -> AsyncIterator[Front]:
    async with site(folder, *SECRET, *options, recording=recording) as lumos:
        address = lumos.url.removeprefix("http://")
        with running_nginx(folder, address, *changes) as url:
            yield Front(lumos, url)


def test_nginx_takes_the_deployed_file_as_it_is(tmp_path: Path) -> None:
    config = write_config(tmp_path, "127.0.0.1:8081", "127.0.0.1:8080")
    done = subprocess.run(
        [find_nginx(), "-t", "-p", tmp_path, "-c", config, "-e", tmp_path / "error.log"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


# The cache


async def test_a_shared_range_comes_from_the_cache_each_representation_its_own(tmp_path: Path) -> None:
    async with front(tmp_path) as lumos:
        link = await lumos.share(await lumos.ended_run())
        for accept in ("text/event-stream", "application/json"):
            first = await lumos.get(link, accept=accept)
            second = await lumos.get(link, accept=accept)
            assert [answer.headers["X-Cache-Status"] for answer in (first, second)] == ["MISS", "HIT"]
            assert second.content == first.content
            assert second.headers["Content-Type"].startswith(accept)
            for name in ("ETag", "Cache-Control", "Expires", "Vary"):
                assert second.headers[name] == first.headers[name]
            end = parsedate_to_datetime(second.headers["Expires"]).timestamp()
            assert end == int(link.split(".")[1]) - 1, "whatever cache is behind nginx, it keeps it no longer"
            assert not {"max-age", "s-maxage"} & set(re.findall(r"[\w-]+", second.headers["Cache-Control"]))
            known = await lumos.client.get(
                f"{lumos.url}{link}", headers={"Accept": accept, "If-None-Match": first.headers["ETag"]}
            )
            assert (known.status_code, known.headers["X-Cache-Status"]) == (304, "HIT")
        part = await lumos.get(f"{link}?after=1&until=3", accept="application/json")
        assert part.headers["X-Cache-Status"] == "MISS"
        assert [entry["seq"] for entry in part.json()["events"]] != []


async def test_the_cache_serves_while_lumos_is_gone(tmp_path: Path) -> None:
    async with front(tmp_path) as lumos:
        link = await lumos.share(await lumos.ended_run())
        first = await lumos.get(link)
        lumos.serve.process.kill()
        await lumos.serve.wait_exit()
        again = await lumos.get(link)
        assert (again.status_code, again.content) == (200, first.content)
        assert (await lumos.get(f"{link}?until=2")).status_code == 502


async def test_what_is_somebodys_own_or_refused_is_never_kept(tmp_path: Path) -> None:
    everything = (("location /api/v1/shared/ {", "location /api/ {"),)
    async with front(tmp_path, changes=everything) as lumos:
        run_id = await lumos.ended_run()
        await lumos.share(run_id)  # it waits until its ranges are for caches at all
        paths = [
            f"{API}/runs/{run_id}",
            f"{API}/runs/{run_id}/events",
            f"{API}/runs/{run_id}/events?after=0&until=2",
            f"{API}/runs/{run_id}/events?after=0&until=99999",
            f"{API}/shared/{run_id}.1.{'A' * 43}/events",
            f"{API}/agents",
        ]
        for path in paths:
            for _ in range(2):
                answer = await lumos.get(path)
                assert answer.headers["X-Cache-Status"] == "MISS", path
        whole = await lumos.get(paths[2])
        assert whole.headers["Cache-Control"].startswith("private, ")


# Live streams


async def test_a_live_stream_passes_piece_by_piece(tmp_path: Path) -> None:
    async with front(tmp_path, recording=steady_recording(first=0.1, gap=0.1, last=1.5)) as lumos:
        async with lumos.open_chat() as answer:
            texts_at_read = []
            with trio.fail_after(LONG):
                while await answer.read_some():
                    texts_at_read.append(sum(isinstance(event, TextDelta) for event in answer.events))
            assert isinstance(answer.events[-1], GenerationComplete)
        growing = [later > earlier for earlier, later in pairwise(texts_at_read)]
        assert sum(growing) >= texts_at_read[-1] / 2, "most pieces came in reads of their own"


@pytest.mark.parametrize("buffering", ["off", "on"])
async def test_text_comes_while_the_model_still_speaks(buffering: str, tmp_path: Path) -> None:
    # Even where someone left nginx's buffering on: the answer's own header turns it off.
    changes = (("proxy_buffering off;", f"proxy_buffering {buffering};"),)
    async with front(tmp_path, recording=STEADY, changes=changes) as lumos, lumos.open_chat() as answer:
        await answer.read_text()
        assert lumos.vendor.calls[0].ended_at is None
        run_id = answer.response.headers["X-Run-Id"]
        async with lumos.client.stream("GET", f"{lumos.url}{API}/runs/{run_id}/events") as response:
            second = LiveAnswer(response)
            await second.read_text()
        assert lumos.vendor.calls[0].ended_at is None


async def test_a_client_that_goes_is_noticed_through_nginx(tmp_path: Path) -> None:
    async with front(tmp_path, "--resume-grace", "0", recording=STEADY) as lumos:
        async with lumos.open_chat() as answer:
            await answer.read_text()
        ended = await lumos.serve.wait_line("run.ended")
        assert ended["reason"] == "stop:disconnect"


async def test_a_stream_whose_server_dies_is_broken_not_complete(tmp_path: Path) -> None:
    async with front(tmp_path, recording=STEADY) as lumos, lumos.open_chat() as answer:
        await answer.read_text()
        lumos.serve.process.kill()
        with pytest.raises(httpx.ReadError, match="incomplete"):
            await answer.read_to_end()
