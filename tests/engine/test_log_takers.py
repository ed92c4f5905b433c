"""Readers that have something taken for them while they wait: what they are offered, and when they come themselves."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine import AgentStarted, AgentStopped, LogEntry, RunLog, StreamingConfig, TextDelta
from engine.emitter import Emitter
from engine.events import Event

START = AgentStarted("agent", "run", "now")
END = AgentStopped("requested", "", None)


class Reader:
    """Reads a log with a ``take``, which refuses once ``taking`` is off; ``seen`` has what it did."""

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self.after = 0
        self.taking = True
        self.seen: list[tuple[str, list[int]]] = []
        self.bug: Exception | None = None

    def take(self, entries: Sequence[LogEntry], now: float) -> bool:
        assert now <= trio.current_time()
        if self.bug is not None:
            raise self.bug
        if self.taking:
            self.note("taken", entries)
        return self.taking

    def note(self, how: str, entries: Sequence[LogEntry]) -> None:
        self.seen.append((how, [entry.seq for entry in entries]))
        self.after = entries[-1].seq

    async def run(self, deadline: float = inf) -> None:
        while entries := await self.log.read(self.after, deadline, self.take):
            self.note("read", entries)


def say(log: RunLog, *events: Event, more_follows: bool = False) -> None:
    """As a model call does with what one upstream read brought."""
    log.hold()
    for event in events:
        log.append(event)
    log.release(more_follows=more_follows)


def delta(text: str) -> TextDelta:
    return TextDelta(text, "step-1")


def started() -> tuple[RunLog, Reader]:
    log = RunLog("run")
    log.append(START)
    return log, Reader(log)


async def test_what_one_read_brought_is_taken_in_one_go_while_its_reader_waits(nursery: trio.Nursery) -> None:
    log, reader = started()
    say(log, delta("before it waits"))
    nursery.start_soon(reader.run)
    await wait_all_tasks_blocked()
    say(log, delta("a"), delta("b"))
    assert reader.seen == [("read", [1, 2]), ("taken", [3, 4])]
    say(log, delta("c"))
    assert reader.seen[2:] == [("taken", [5])]
    say(log, END)
    await wait_all_tasks_blocked()
    assert reader.seen[3:] == [("read", [6])]
    assert not log.waiting


async def test_what_is_refused_is_read_once_with_all_that_follows(nursery: trio.Nursery) -> None:
    log, reader = started()
    nursery.start_soon(reader.run)
    await wait_all_tasks_blocked()
    reader.taking = False
    say(log, delta("refused"))
    reader.taking = True
    say(log, delta("not offered to who comes anyway"))
    await wait_all_tasks_blocked()
    say(log, delta("taken again"))
    assert reader.seen == [("read", [1]), ("read", [2, 3]), ("taken", [4])]


@pytest.mark.parametrize("more_follows", [False, True])
async def test_more_that_follows_at_once_is_read_together(nursery: trio.Nursery, more_follows: bool) -> None:
    log, reader = started()
    nursery.start_soon(reader.run)
    await wait_all_tasks_blocked()
    say(log, delta("last words"), more_follows=more_follows)
    log.append(END)
    await wait_all_tasks_blocked()
    assert reader.seen[1:] == ([("read", [2, 3])] if more_follows else [("taken", [2]), ("read", [3])])


async def test_an_event_outside_wakes_the_reader(nursery: trio.Nursery) -> None:
    log, reader = started()
    nursery.start_soon(reader.run)
    await wait_all_tasks_blocked()
    log.append(delta("a"))
    log.append(delta("b"))
    await wait_all_tasks_blocked()
    assert reader.seen == [("read", [1]), ("read", [2, 3])]


async def test_each_reader_gets_everything_whether_it_takes_or_reads(nursery: trio.Nursery) -> None:
    log, reader = started()
    other = Reader(log)
    plain: list[int] = []

    async def read_plainly() -> None:
        while entries := await log.read(plain[-1] if plain else 0):
            plain.extend(entry.seq for entry in entries)

    for read in (reader.run, other.run, read_plainly):
        nursery.start_soon(read)
    await wait_all_tasks_blocked()
    other.taking = False
    say(log, delta("a"))
    await wait_all_tasks_blocked()
    assert (reader.seen[1:], other.seen[1:], plain) == ([("taken", [2])], [("read", [2])], [1, 2])


async def test_a_bug_in_taking_is_the_readers_and_none_of_the_runs(autojump_clock: MockClock) -> None:
    log, reader = started()
    reader.bug = ZeroDivisionError("a bug")

    async def read() -> None:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await reader.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        say(log, delta("a"))
        assert log.last_seq == 2


@pytest.mark.parametrize("way", ["cancelled", "deadline"])
async def test_a_reader_that_goes_is_offered_nothing_more(autojump_clock: MockClock, way: str) -> None:
    log, reader = started()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run, 1.0 if way == "deadline" else inf)
        await trio.sleep(0.5)
        say(log, delta("a"))
        if way == "cancelled":
            nursery.cancel_scope.cancel()
    say(log, delta("b"))
    assert reader.seen == [("read", [1]), ("taken", [2])]
    assert trio.current_time() == (0.5 if way == "cancelled" else 1.0)
    assert not log.waiting


async def test_a_reader_that_another_one_sends_away_is_offered_nothing_more(autojump_clock: MockClock) -> None:
    log, other = started()
    scope = trio.CancelScope()

    def send_away(_: object, __: float) -> bool:
        scope.cancel()
        return True

    async def read_until_sent_away() -> None:
        with scope:
            await other.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.read, 1, inf, send_away)
        await wait_all_tasks_blocked()
        nursery.start_soon(read_until_sent_away)
        await wait_all_tasks_blocked()
        say(log, delta("a"))
        assert len(log.waiting) == 1
        nursery.cancel_scope.cancel()
    assert other.seen == [("read", [1])]


async def test_gathered_text_is_sealed_for_who_takes_it_and_waited_for_if_it_is_not_due(
    autojump_clock: MockClock,
) -> None:
    log, reader = started()
    emitter = Emitter(log, StreamingConfig(text_buffer_size=3, flush_after=2.0), 10_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        await wait_all_tasks_blocked()
        for text in ("the first never waits", "abc", "d"):
            emitter.log.hold()
            emitter.text(text, "step-1")
            emitter.log.release(more_follows=False)
        assert reader.seen == [("read", [1]), ("taken", [2]), ("taken", [3])]
        await trio.sleep(3)
        assert reader.seen[3:] == [("read", [4])]
        nursery.cancel_scope.cancel()
    assert [entry.event for entry in log.entries(2)] == [delta("abc"), delta("d")]
