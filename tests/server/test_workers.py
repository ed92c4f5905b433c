"""``lumos serve --workers N``: one port, crashed workers replaced, drains that keep every stream, no orphans."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from tests.harness.recordings import steady_recording
from tests.harness.redis import RedisServer
from tests.server.commands import complaint, lumos
from tests.server.shared_scene import eventually
from tests.server.workers_scene import COMMAND, LONG, ROOT, Workers, is_running, new_client, open_workers

SHORT = steady_recording(first=0.1, gap=0.05, last=0.4)
LASTING = steady_recording(first=0.1, gap=0.1, last=2.0)
ENDLESS = steady_recording(first=0.1, gap=0.1, last=60.0)


def test_several_workers_without_redis_are_refused() -> None:
    refusal = complaint(lumos("serve", "--workers", "2"))
    assert refusal == "--workers 2 needs --redis-url: without it a worker cannot find the others' runs"


def test_a_url_that_is_none_of_redis_is_refused() -> None:
    refused = complaint(lumos("serve", "--port", "0", "--redis-url", "http://:secret@127.0.0.1"))
    assert refused.startswith("--redis-url: the Redis URL must be like redis://")
    assert "secret" not in refused


def test_a_lease_that_is_too_short_is_refused() -> None:
    refused = complaint(lumos("serve", "--port", "0", "--redis-url", "redis://127.0.0.1:1", "--lease", "0.1"))
    assert refused == "--lease must be at least 0.5 s: workers speak every third of it"


async def _stream(workers: Workers, answers: list[str], started: trio.Event) -> None:
    async with new_client() as client:
        url = f"{workers.url}/api/v1/agents/local/chat/lumosai/stream"
        async with client.stream("POST", url, json={"message": "?"}) as response:
            text = ""
            async for piece in response.aiter_text():
                text += piece
                if "word" in text:
                    started.set()
    answers.append(text)


async def _streaming(workers: Workers, nursery: trio.Nursery, count: int) -> list[str]:
    answers: list[str] = []
    events = [trio.Event() for _ in range(count)]
    for event in events:
        nursery.start_soon(_stream, workers, answers, event)
    for event in events:
        await event.wait()
    return answers


async def test_sigterm_drains_every_worker_and_exits_with_0(redis_server: RedisServer, tmp_path: Path) -> None:
    async with open_workers(tmp_path, redis_server.url, LASTING) as workers:
        async with trio.open_nursery() as nursery:
            answers = await _streaming(workers, nursery, 6)
            workers.process.terminate()
        assert await workers.wait_exit() == 0
        assert [text.count('"chunk_type":"done"') for text in answers] == [1] * 6
        assert {line["worker"] for line in await workers.wait_lines("server.ended", 2)} == {"1", "2"}
        assert {line["share_links"] for line in workers.of("server.started")} == {"until this process ends"}


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
async def test_a_second_signal_or_ctrl_c_ends_all_at_once(
    signals: list[signal.Signals], redis_server: RedisServer, tmp_path: Path
) -> None:
    async with open_workers(tmp_path, redis_server.url, ENDLESS) as workers:
        async with trio.open_nursery() as nursery:
            answers = await _streaming(workers, nursery, 4)
            for signum in signals:
                workers.process.send_signal(signum)
                await workers.wait_lines("server.draining", 2)
        assert await workers.wait_exit() == 0
        assert [text.count('"code":"draining"') for text in answers] == [1] * 4


async def test_a_crashed_worker_is_replaced_and_the_others_go_on(redis_server: RedisServer, tmp_path: Path) -> None:
    async with open_workers(tmp_path, redis_server.url, LASTING, "--lease", "1") as workers:
        before = workers.living()
        os.kill(before["1"], signal.SIGKILL)
        (crashed,) = await workers.wait_lines("worker.crashed")
        assert (crashed["worker"], crashed["exit_code"]) == ("1", -signal.SIGKILL)
        await workers.wait_serving(3)
        after = workers.living()
        assert after["2"] == before["2"]
        assert set(after) == {"1", "2"}
        async with trio.open_nursery() as nursery:
            answers = await _streaming(workers, nursery, 4)
        assert [text.count('"chunk_type":"done"') for text in answers] == [1] * 4


async def test_the_workers_go_when_their_parent_is_killed(redis_server: RedisServer, tmp_path: Path) -> None:
    async with open_workers(tmp_path, redis_server.url, SHORT) as workers:
        pids = workers.living().values()
        workers.process.kill()
        await eventually(lambda: not any(is_running(pid) for pid in pids))


async def test_settings_that_no_worker_can_use_end_the_parent(tmp_path: Path) -> None:
    options = ["--workers", "2", "--redis-url", "redis://127.0.0.1:1", "--host", "0.0.0.0"]
    environment = os.environ | {"LUMOS_DATABASE_URL": f"sqlite:///{tmp_path}/lumos.db"}
    with trio.fail_after(LONG):
        ended = await trio.run_process(
            [*COMMAND, *options], check=False, capture_stderr=True, env=environment, cwd=ROOT
        )
    assert ended.returncode == 1
    assert b"0.0.0.0" in ended.stderr
    assert b"worker.crashed" not in ended.stderr
