"""A real Chromium's own WebSocket: two runs at once on one socket, read on over another one after it."""

from __future__ import annotations

from pathlib import Path

from tests.browser.chromium import Chromium, Seen
from tests.browser.scene import QUICK, check_sequence, is_closed, restarting


async def test_a_page_starts_two_runs_leaves_and_reads_both_on(tmp_path: Path, chromium: Chromium) -> None:
    async with restarting(tmp_path, QUICK, chromium) as (lumos, browser):
        url = lumos.url.replace("http://", "ws://") + "/api/v1/ws"
        async with browser.open("web-socket", url) as page:
            seen = await page.wait(is_closed)
    assert (seen.opened, seen.protocol) == (2, "lumos.v1")
    run_ids = {event_id.partition(".")[0] for event_id, _ in seen.events}
    assert len(run_ids) == 2
    for run_id in run_ids:
        of_run = Seen(events=[(event_id, event) for event_id, event in seen.events if event_id.startswith(run_id)])
        check_sequence(of_run, run_id)
        done = of_run.events[-1][1]
        assert done["chunk_type"] == "done"
        assert of_run.text == done["response"] == QUICK.text
