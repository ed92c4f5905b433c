"""What the log says of who asks: refused requests, and the owners of runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import structlog
import trio
from structlog.contextvars import merge_contextvars
from structlog.testing import LogCapture
from trio.testing import MockClock

from engine import RunSupervisor
from engine.memory import Owner
from server.keys import make_key
from server.logs import RunLogger
from server.principal import KeyLimits
from server.refusals import LINES_PER_SECOND, MAX_PATH_CHARS
from server.store import keys as key_rows
from tests.engine.scripted import SENT, ScriptedProvider, spec_for, text
from tests.harness.world import open_keeping_world
from tests.server.api_scene import API

NOW = "2026-11-22T12:00:00.000000+00:00"


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """What is logged while the test runs, with what tasks have bound."""
    capture = LogCapture()
    before = structlog.get_config()["processors"]
    structlog.configure(processors=[merge_contextvars, capture])
    yield capture.entries
    structlog.configure(processors=before)


def told(lines: list[Any], event: str) -> list[Any]:
    return [{k: v for k, v in line.items() if k != "event"} for line in lines if line["event"] == event]


async def test_refused_keys_and_those_who_ask_too_often_are_told(lines: list[Any], autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        key, text_of_key = make_key("acme", "ada", False, "", KeyLimits(requests_per_minute=1), NOW)
        assert world.database is not None
        await world.database.write(key_rows.create_key, key)
        wrong = text_of_key[:-5] + "AAAAA"
        for headers in ({}, {"X-API-Key": wrong}, *[{"Authorization": f"Bearer {text_of_key}"}] * 2):
            await world.client.get(f"{API}/me", headers=headers)
        await world.client.get(f"{API}/me%0a{'x' * 500}?key={text_of_key}", headers={})
        await world.client.get(f"{API}/runs/%0a{'x' * 500}?key={text_of_key}", headers={})
    refused = told(lines, "request.refused")
    assert [(line["status"], line["code"], line.get("key_id")) for line in refused] == [
        (401, "UNAUTHORIZED", None),
        (401, "UNAUTHORIZED", key.key_id),
        (429, "RATE_LIMITED", key.key_id),
        (401, "UNAUTHORIZED", None),
    ]
    assert all(line["log_level"] == "warning" and line["client"] for line in refused)
    assert refused[0]["path"] == "/api/v1/me"
    assert refused[-1]["path"].startswith(r"/api/v1/runs/\nxxx")
    assert len(refused[-1]["path"]) == MAX_PATH_CHARS
    secret = text_of_key.split("_", 2)[2]
    assert secret not in repr(lines)
    assert wrong.split("_", 2)[2] not in repr(lines)


async def test_a_flood_of_refusals_is_counted(lines: list[Any], autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        await trio.sleep(5)  # what other tests did is more than a second ago
        for _ in range(LINES_PER_SECOND + 15):
            await world.client.get(f"{API}/me", headers={"X-API-Key": "lumos_wrong"})
        assert len(told(lines, "request.refused")) == LINES_PER_SECOND
        await trio.sleep(1)
        await world.client.get(f"{API}/me", headers={"X-API-Key": "lumos_wrong"})
        assert told(lines, "request.refused")[-1]["left_out_before"] == 15


async def test_whose_a_run_is_is_told(lines: list[Any], autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        structlog.contextvars.bind_contextvars(key_id="k1")  # as a request does
        owner = Owner(tenant_id="acme", user_id="ada", session_id="s1")
        spec = msgspec.structs.replace(spec_for(ScriptedProvider((0, (SENT,)), (1, text("x")))), owner=owner)
        RunSupervisor(nursery, RunLogger()).start(spec)
        structlog.contextvars.unbind_contextvars("key_id")
    for event in ("run.started", "run.ended"):
        (line,) = told(lines, event)
        assert [line[name] for name in ("tenant_id", "user_id", "session_id", "key_id")] == ["acme", "ada", "s1", "k1"]
