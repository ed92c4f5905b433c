"""A real Chromium reads a run: its EventSource, and a page with ``fetch``, go on across a restart of the server."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium, Seen
from tests.browser.scene import ENDLESS, QUICK, check_sequence, is_closed, restarting

CONTENT = 3
"""Texts that the page shall have before the server is restarted."""


def has_text(seen: Seen) -> bool:
    kinds = [event["chunk_type"] for _, event in seen.events]
    return kinds.count("content") >= CONTENT


@pytest.mark.parametrize("way", ["event-source", "fetch"])
async def test_a_page_goes_on_after_a_kill_and_hears_how_its_run_ended(
    way: str, tmp_path: Path, chromium: Chromium
) -> None:
    async with restarting(tmp_path, ENDLESS, chromium) as (lumos, browser):
        run_id = await lumos.start_run()
        async with browser.open(way, lumos.events_url(run_id)) as page:
            await page.wait(has_text)
            await lumos.end(signal.SIGKILL)
            await lumos.start()
            seen = await page.wait(is_closed)
    check_sequence(seen, run_id)
    assert (seen.events[-1][1]["chunk_type"], seen.events[-1][1]["code"]) == ("error", "interrupted")
    assert seen.opened >= 2
    assert "".join(f"word{number} " for number in range(800)).startswith(seen.text)


@pytest.mark.parametrize("way", ["event-source", "fetch"])
async def test_a_page_has_the_whole_answer_of_a_run_from_before_the_restart(
    way: str, tmp_path: Path, chromium: Chromium
) -> None:
    async with restarting(tmp_path, QUICK, chromium) as (lumos, browser):
        run_id = await lumos.start_run()
        await lumos.process.wait_line("run.ended")
        if way == "event-source":  # it meets nobody, and comes again by itself
            await lumos.end(signal.SIGTERM)
        async with browser.open(way, lumos.events_url(run_id)) as page:
            if way == "fetch":
                await page.wait(lambda seen: len(seen.events) >= 2)
                await lumos.end(signal.SIGTERM)
            else:
                await page.wait(lambda seen: seen.state == "waiting")
            await lumos.start()
            seen = await page.wait(is_closed)
    check_sequence(seen, run_id)
    done = seen.events[-1][1]
    assert done["chunk_type"] == "done"
    assert seen.text == done["response"]
