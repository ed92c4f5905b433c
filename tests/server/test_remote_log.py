"""The log of another worker's run as it is read here, without any Redis: numbers, bytes, waiting, breaking."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from engine import AgentStarted, Error, Event, GenerationComplete, Metadata, RunLog, TextDelta
from engine.events import data_of
from server.leases import LOST_SEQ
from server.remote_log import CURSORS_AHEAD, OUTAGE_SECONDS, EventsLostError, RemoteLogs, highest_cursor

STARTED = AgentStarted("agent", "run", "2026-11-22T12:00:00+00:00")
DONE = GenerationComplete("text", 1, 1.0, 0.5, None)


def _json(event: Event) -> bytes:
    return msgspec.json.encode(event)


def test_frames_are_the_bytes_of_the_run_itself() -> None:
    own = RunLog("run")
    log = RemoteLogs().get("run", "worker")
    for event in (STARTED, TextDelta("Grüße\n\U0001f600", "s1"), DONE):
        entry = own.append(event)
        log.admit(entry.seq, data_of(entry.frame))
    assert log.entries == own.entries()
    assert (log.ended, log.terminal, log.size_bytes) == (True, DONE, own.size_bytes)


def test_what_is_there_already_is_taken_once_and_nothing_after_the_end() -> None:
    log = RemoteLogs().get("run", "worker")
    for seq, event in ((1, STARTED), (1, STARTED), (2, DONE), (3, DONE)):
        log.admit(seq, _json(event))
    assert [entry.seq for entry in log.entries] == [1, 2]


async def test_a_gap_breaks_readers_but_the_end_of_a_lost_run_is_none(autojump_clock: trio.testing.MockClock) -> None:
    logs = RemoteLogs()
    for event, broken in ((TextDelta("x", "s1"), True), (Error("worker_lost", "gone"), False)):
        log = logs.get(f"run {broken}", "worker")
        log.admit(1, _json(STARTED))
        log.admit(LOST_SEQ, _json(event))
        if broken:
            with pytest.raises(EventsLostError):
                await log.read(1)
        else:
            for after in (1, 40, LOST_SEQ - 1):
                assert [entry.seq for entry in await log.read(after)] == [LOST_SEQ]
            assert await log.read(LOST_SEQ) == []


async def test_a_cursor_beyond_the_end_is_no_clean_end(autojump_clock: trio.testing.MockClock) -> None:
    log = RemoteLogs().get("run", "worker")
    log.admit(1, _json(STARTED))
    assert highest_cursor(log) == 1 + CURSORS_AHEAD
    log.admit(2, _json(DONE))
    assert highest_cursor(log) == 2
    assert await log.read(2) == []
    with pytest.raises(EventsLostError):
        await log.read(3)


async def test_readers_wait_through_an_outage_and_break_after_it(autojump_clock: trio.testing.MockClock) -> None:
    logs = RemoteLogs()
    log = logs.get("run", "worker")
    logs.link_changed(trio.current_time())
    assert await log.read(0, trio.current_time() + 5) == []
    with pytest.raises(EventsLostError):
        await log.read(0)
    assert trio.current_time() == OUTAGE_SECONDS


def test_events_of_a_later_version_pass_as_they_are() -> None:
    log = RemoteLogs().get("run", "worker")
    log.admit(1, b'{"chunk_type":"hologram","size":3}')
    (entry,) = log.entries
    assert entry.event == Metadata("unknown_event", None)
    assert b'data: {"chunk_type":"hologram","size":3}\n\n' in entry.frame
