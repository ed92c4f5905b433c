"""The log: cursors, waiting, deadlines, and nothing left over from a reader that went."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine import AgentStarted, AgentStopped, Event, LogEntry, Metadata, RunLog, TextDelta
from engine.errors import EventOrderError
from engine.events import encode_frame

START = AgentStarted("agent", "run", "now")
END = AgentStopped("requested", "", None)


def log_with(*contents: str) -> RunLog:
    """A started log with these deltas: the first of them is number 2."""
    log = RunLog("run")
    log.append(START)
    for content in contents:
        log.append(TextDelta(content, "step"))
    return log


def waiting_readers(log: RunLog) -> int:
    return len(log.waiting)


def seqs(entries: list[LogEntry]) -> list[int]:
    return [entry.seq for entry in entries]


def test_a_new_log_is_empty() -> None:
    log = RunLog("run")
    assert (log.last_seq, log.ended, log.terminal, log.size_bytes, log.readers) == (0, False, None, 0, 0)


def test_events_are_numbered_from_one_and_encoded_once() -> None:
    log = RunLog("run")
    appended = [log.append(event) for event in (START, TextDelta("a", "step"), END)]
    assert appended == log.entries()
    for seq, entry in enumerate(appended, 1):
        assert entry == LogEntry(seq, entry.event, encode_frame("run", seq, entry.event))
    assert log.last_seq == 3
    assert log.size_bytes == sum(len(entry.frame) for entry in appended)


def test_the_terminal_event_ends_the_log() -> None:
    log = log_with("a")
    assert (log.ended, log.terminal) == (False, None)
    log.append(END)
    assert (log.ended, log.terminal) == (True, END)
    with pytest.raises(EventOrderError, match="ENDED"):
        log.append(END)


@pytest.mark.parametrize("refused", [START, Metadata("key", object())], ids=["not allowed", "not encodable"])
async def test_a_refused_event_leaves_the_log_as_it_was(autojump_clock: MockClock, refused: Event) -> None:
    log = log_with("a")
    before = log.entries(), log.size_bytes, log.last_seq
    with pytest.raises((EventOrderError, TypeError)):
        log.append(refused)
    assert (log.entries(), log.size_bytes, log.last_seq) == before
    assert await log.read(2, deadline=1.0) == []
    assert log.append(TextDelta("b", "step")).seq == 3


def test_a_terminal_event_that_cannot_be_encoded_does_not_end_the_log() -> None:
    log = log_with("a")
    with pytest.raises(UnicodeEncodeError):
        log.append(AgentStopped("\ud800", "", None))
    assert (log.ended, log.terminal) == (False, None)
    log.append(END)
    assert (log.ended, log.terminal) == (True, END)


@pytest.mark.parametrize("after", range(5))
async def test_a_read_returns_everything_after_the_cursor_at_once(autojump_clock: MockClock, after: int) -> None:
    log = log_with("a", "b", "c")
    assert seqs(await log.read(after, deadline=1.0)) == list(range(after + 1, 5))
    assert trio.current_time() == (0.0 if after < 4 else 1.0)


def test_entries_are_what_is_there_without_waiting() -> None:
    log = log_with("a", "b")
    assert seqs(log.entries()) == [1, 2, 3]
    assert seqs(log.entries(2)) == [3]
    assert log.entries(3) == log.entries(99) == []


async def test_a_read_waits_for_the_next_event(autojump_clock: MockClock) -> None:
    log = log_with()

    async def write() -> None:
        await trio.sleep(3)
        log.append(TextDelta("late", "step"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        assert seqs(await log.read(1)) == [2]
        assert trio.current_time() == 3.0


async def test_a_busy_reader_takes_all_that_gathered_in_one_go(autojump_clock: MockClock) -> None:
    log = log_with()
    assert seqs(await log.read(0)) == [1]
    for content in "abc":
        await trio.sleep(1)
        log.append(TextDelta(content, "step"))
    assert seqs(await log.read(1)) == [2, 3, 4]


async def test_events_of_one_tick_are_one_read(autojump_clock: MockClock) -> None:
    log = log_with()
    reads: list[list[int]] = []

    async def read() -> None:
        cursor = 1
        while entries := await log.read(cursor):
            cursor = entries[-1].seq
            reads.append(seqs(entries))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        log.append(TextDelta("a", "step"))
        log.append(TextDelta("b", "step"))
        await trio.sleep(1)
        log.append(END)
    assert reads == [[2, 3], [4]]


async def test_every_reader_gets_the_very_same_frames(autojump_clock: MockClock) -> None:
    log = log_with()
    got: dict[int, list[bytes]] = {reader: [] for reader in range(10)}

    async def read(reader: int) -> None:
        await trio.sleep(reader)  # some come early, some in the middle, some after the end
        cursor = 0
        while entries := await log.read(cursor):
            cursor = entries[-1].seq
            got[reader] += [entry.frame for entry in entries]
            await trio.sleep(reader / 4)

    async with trio.open_nursery() as nursery:
        for reader in got:
            nursery.start_soon(read, reader)
        for content in "abcd":
            await trio.sleep(1)
            log.append(TextDelta(content, "step"))
        log.append(END)
    expected = [entry.frame for entry in log.entries()]
    assert all(frames == expected for frames in got.values())
    # Cached, not encoded anew: one bytes object for all readers.
    assert len({id(frame) for frames in got.values() for frame in frames}) == len(expected) == 6


async def test_the_deadline_ends_a_wait_exactly_then(autojump_clock: MockClock) -> None:
    log = log_with()
    assert await log.read(1, deadline=15.0) == []
    assert trio.current_time() == 15.0
    assert not log.ended
    assert await log.read(1, deadline=15.0) == []
    assert trio.current_time() == 15.0


async def test_a_deadline_that_has_passed_still_gives_what_is_there(autojump_clock: MockClock) -> None:
    log = log_with("a")
    await trio.sleep(1)
    assert seqs(await log.read(0, deadline=0.5)) == [1, 2]


async def test_at_the_end_of_an_ended_log_a_read_is_empty_at_once(autojump_clock: MockClock) -> None:
    log = log_with()
    log.append(END)
    assert seqs(await log.read(1)) == [2]
    assert await log.read(2) == []
    assert await log.read(99) == []
    assert trio.current_time() == 0.0


async def test_the_end_wakes_a_reader_whose_cursor_is_ahead(autojump_clock: MockClock) -> None:
    log = log_with()
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            assert await log.read(7) == []
            assert log.ended

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        log.append(TextDelta("a", "step"))
        await wait_all_tasks_blocked()
        assert waiting_readers(log) == 1
        log.append(END)


async def test_who_waits_for_the_end_is_not_content_with_other_events(autojump_clock: MockClock) -> None:
    log = log_with()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.wait_ended)
        for content in ("a", "b"):
            await wait_all_tasks_blocked()
            log.append(TextDelta(content, "step"))
        await wait_all_tasks_blocked()
        assert waiting_readers(log) == 1
        log.append(END)
    await log.wait_ended()


async def test_who_waits_for_several_logs_is_woken_by_each_of_them(autojump_clock: MockClock) -> None:
    logs = [log_with(), log_with()]
    lot = trio.lowlevel.ParkingLot()
    for log in logs:
        log.also_wake(lot)
    for log in logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lot.park)
            await wait_all_tasks_blocked()
            log.append(END)


async def test_a_cursor_ahead_waits_for_its_own_next_event(autojump_clock: MockClock) -> None:
    log = log_with()
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            for content in "abc":
                await trio.sleep(1)
                log.append(TextDelta(content, "step"))

        nursery.start_soon(write)
        assert seqs(await log.read(3)) == [4]
        assert trio.current_time() == 3.0


async def test_a_wake_up_for_nothing_changes_no_deadline(autojump_clock: MockClock) -> None:
    log = log_with()
    async with trio.open_nursery() as nursery:

        async def wake() -> None:
            for _ in range(4):
                await trio.sleep(1)
                log.wake()

        nursery.start_soon(wake)
        assert await log.read(1, deadline=2.5) == []
        assert trio.current_time() == 2.5


async def test_a_cancelled_reader_leaves_nothing_parked(autojump_clock: MockClock) -> None:
    log = log_with()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.read, 1)
        await wait_all_tasks_blocked()
        assert waiting_readers(log) == 1
        nursery.cancel_scope.cancel()
    assert waiting_readers(log) == 0
    log.append(END)


async def test_a_deadline_leaves_nothing_parked(autojump_clock: MockClock) -> None:
    log = log_with()
    await log.read(1, deadline=1.0)
    assert waiting_readers(log) == 0


async def test_a_cancelled_task_gets_no_events(autojump_clock: MockClock) -> None:
    log = log_with("a")
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.read(0)
    assert scope.cancelled_caught


async def test_one_reader_cancelled_does_not_touch_another(autojump_clock: MockClock) -> None:
    log = log_with()
    got: list[LogEntry] = []

    async def read_on() -> None:
        got.extend(await log.read(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_on)
        with trio.move_on_after(1):
            await log.read(1)
        assert waiting_readers(log) == 1
        log.append(TextDelta("a", "step"))
    assert seqs(got) == [2]


async def test_readers_are_counted_while_attached(autojump_clock: MockClock) -> None:
    log = log_with()
    heard: list[int] = []
    log.on_readers_changed = heard.append
    with log.attached():
        assert log.readers == 1
        with log.attached():
            assert log.readers == 2
    assert log.readers == 0
    assert heard == [1, 2, 1, 0]


async def test_a_reader_that_fails_or_is_cancelled_is_counted_out(autojump_clock: MockClock) -> None:
    log = log_with()
    heard: list[int] = []
    log.on_readers_changed = heard.append
    with pytest.raises(ValueError, match="broken"), log.attached():
        raise ValueError("broken")
    with trio.move_on_after(1), log.attached():
        await log.read(1)
    assert heard == [1, 0, 1, 0]


def test_counting_needs_nobody_who_listens() -> None:
    log = log_with()
    with log.attached():
        assert log.readers == 1
    assert log.readers == 0


def test_who_copies_the_log_hears_of_every_event() -> None:
    log = RunLog("run")
    heard: list[int] = []
    log.append(AgentStarted("agent", "run", "now"))
    log.on_append = lambda appended: heard.append(appended.last_seq)
    log.append(TextDelta("a", "step-1"))
    log.append(AgentStopped("requested", "a", None))
    assert heard == [2, 3]
