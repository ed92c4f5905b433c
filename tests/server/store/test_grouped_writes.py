"""Changes that wait for SQLite's writer are made together, and yet each stands and falls by itself."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
import trio.testing
from sqlalchemy import Connection, event
from trio.testing import MockClock

from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.grouped_writes import MOST_AT_ONCE, QUEUE_SECONDS, Change, GroupedWrites
from server.store.turns import begin_run, begin_turn, find_run

from .scene import SCOPE, at, said


def begin(run_id: str) -> Callable[[Connection], str]:
    """A change that gives the run's id back."""

    def change(c: Connection) -> str:
        begin_turn(c, SCOPE, "session", run_id, None, said("hello"), at(1))
        return run_id

    return change


class Busy:
    """A database whose writer is busy until ``free`` is called; ``transactions`` counts its transactions."""

    def __init__(self, database: Database, nursery: trio.Nursery) -> None:
        self.database = database
        self.transactions = 0
        self._nursery = nursery
        self._may_end = threading.Event()
        event.listen(database._engine, "checkout", lambda connection, *_: connection.set_trace_callback(self._count))

    async def make_busy(self) -> None:
        """Until the thread that writes is in the change."""
        token, begun = trio.lowlevel.current_trio_token(), trio.Event()

        def wait(_: Connection) -> None:
            token.run_sync_soon(begun.set)
            assert self._may_end.wait(20)

        self._nursery.start_soon(self.database.write, wait)
        await begun.wait()

    def free(self) -> None:
        self._may_end.set()

    def _count(self, statement: str) -> None:
        self.transactions += statement == "BEGIN IMMEDIATE"


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[Busy]:
    database = Database.open(f"sqlite:///{tmp_path / 'lumos.db'}", busy_timeout=0.2)
    async with trio.open_nursery() as nursery:
        busy = Busy(database, nursery)
        await busy.make_busy()
        yield busy
        busy.free()
    database.close()


async def write_all(busy: Busy, changes: list[Callable[[Connection], str]]) -> list[object]:
    """What each change gave or raised; all of them wait before the first one can be made."""
    became: list[object] = [None] * len(changes)

    async def write(number: int) -> None:
        try:
            became[number] = await busy.database.write(changes[number])
        except Exception as error:  # noqa: BLE001 - it is looked at
            became[number] = error

    async with trio.open_nursery() as nursery:
        for number in range(len(changes)):
            nursery.start_soon(write, number)
        await trio.testing.wait_all_tasks_blocked()
        busy.free()
    return became


async def test_changes_that_wait_are_one_transaction(busy: Busy) -> None:
    names = [f"run-{number}" for number in range(MOST_AT_ONCE)]
    assert await write_all(busy, [begin(name) for name in names]) == names
    assert busy.transactions == 2  # that which kept the writer busy, and theirs
    assert all([await busy.database.read(find_run, name) for name in names])


async def test_more_than_one_transaction_takes_are_made_in_several(busy: Busy) -> None:
    names = [f"run-{number}" for number in range(2 * MOST_AT_ONCE + 1)]
    assert await write_all(busy, [begin(name) for name in names]) == names
    assert busy.transactions == 4


async def test_changes_are_made_in_the_order_in_which_they_came(busy: Busy) -> None:
    made: list[str] = []

    def note(name: str) -> Callable[[Connection], str]:
        def change(_: Connection) -> str:
            made.append(name)
            return name

        return change

    names = [f"run-{number}" for number in range(5)]
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(busy.database.write, note(name))
            await trio.testing.wait_all_tasks_blocked()
        busy.free()
    assert made == names


async def test_one_that_raises_is_undone_and_the_others_are_kept(busy: Busy) -> None:
    def fail(c: Connection) -> str:
        begin("failed")(c)
        raise KeyError("mine")

    first, failed, last = await write_all(busy, [begin("first"), fail, begin("last")])
    assert (first, last) == ("first", "last")
    assert isinstance(failed, KeyError)
    assert await busy.database.read(find_run, "failed") is None
    assert await busy.database.read(find_run, "first") is not None
    assert await busy.database.read(find_run, "last") is not None


async def test_a_store_that_fails_fails_all_of_them_each_with_an_error_of_its_own(busy: Busy) -> None:
    def cannot(c: Connection) -> str:
        c.exec_driver_sql("PRAGMA query_only = ON")  # from here on SQLite says "read only", which is the store's fault
        return begin("cannot")(c)

    errors = await write_all(busy, [begin("first"), cannot, begin("last")])
    assert all(isinstance(error, StoreUnavailableError) for error in errors)
    assert len(set(map(id, errors))) == 3
    assert await busy.database.read(find_run, "first") is None


async def test_cancelled_while_it_waits_it_is_not_made(busy: Busy) -> None:
    scope = trio.CancelScope()

    async def write_cancelled() -> None:
        with scope:
            await busy.database.write(begin("cancelled"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_cancelled)
        nursery.start_soon(busy.database.write, begin("other"))
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel(reason="the test")
        await trio.testing.wait_all_tasks_blocked()
        assert scope.cancelled_caught
        busy.free()
    assert await busy.database.read(find_run, "cancelled") is None
    assert await busy.database.read(find_run, "other") is not None


@pytest.mark.parametrize("place", [0, 1], ids=["who makes them", "who waits"])
async def test_cancelled_once_it_has_begun_it_is_made_to_its_end(busy: Busy, place: int) -> None:
    token, begun, may_end = trio.lowlevel.current_trio_token(), trio.Event(), threading.Event()
    scopes = [trio.CancelScope(), trio.CancelScope()]
    gave: list[bool] = []

    def slow(c: Connection) -> bool:
        token.run_sync_soon(begun.set)
        assert may_end.wait(20)
        return begin_run(c, SCOPE, "session", "slow", None, at(1))

    async def write(number: int, change: Callable[[Connection], bool]) -> None:
        with scopes[number]:
            gave.append(await busy.database.write(change))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, 0, slow)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, 1, lambda c: begin_run(c, SCOPE, "session", "quick", None, at(1)))
        await trio.testing.wait_all_tasks_blocked()
        busy.free()
        await begun.wait()
        scopes[place].cancel(reason="the test")
        may_end.set()
    assert gave == [True, True]
    for run_id in ("slow", "quick"):
        assert await busy.database.read(find_run, run_id) is not None


async def test_cancelled_as_it_becomes_the_one_who_makes_them_it_makes_them(busy: Busy) -> None:
    scope = trio.CancelScope()
    gave: list[str] = []

    async def write(name: str, own: trio.CancelScope) -> None:
        with own:
            gave.append(await busy.database.write(begin(name)))

    async def cancel_behind(token: trio.lowlevel.TrioToken, begun: trio.Event, may_end: threading.Event) -> None:
        def wait(_: Connection) -> None:
            token.run_sync_soon(begun.set)
            assert may_end.wait(20)

        await busy.database.write(wait)
        scope.cancel(reason="the test")  # in the step in which the next one was called

    begun, may_end = trio.Event(), threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_behind, trio.lowlevel.current_trio_token(), begun, may_end)
        await trio.testing.wait_all_tasks_blocked()
        busy.free()
        await begun.wait()
        nursery.start_soon(write, "cancelled", scope)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, "other", trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        may_end.set()
    assert sorted(gave) == ["cancelled", "other"]


async def test_one_that_waits_too_long_is_refused_and_not_made(autojump_clock: MockClock) -> None:
    may_end = threading.Event()
    made: list[Change] = []

    def make_together(changes: Sequence[Change]) -> Sequence[outcome.Outcome[Any]]:
        assert may_end.wait(20)
        made.extend(changes)
        return [outcome.Value(None) for _ in changes]

    writes = GroupedWrites(make_together)
    with trio.testing.assert_checkpoints():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writes.write, str)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(StoreUnavailableError, match="the changes before this one take longer than 5 s"):
                await writes.write(repr)
            assert trio.current_time() == QUEUE_SECONDS
            may_end.set()
    assert made == [str]


async def test_who_may_give_up_does_not_wait_for_the_end_and_the_next_ones_are_made(busy: Busy) -> None:
    token, begun, may_end = trio.lowlevel.current_trio_token(), trio.Event(), threading.Event()

    def slow(c: Connection) -> bool:
        token.run_sync_soon(begun.set)
        assert may_end.wait(20)
        return begin_run(c, SCOPE, "session", "given up", None, at(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy.database.keep, slow)
        await trio.testing.wait_all_tasks_blocked()
        busy.free()
        await begun.wait()
        nursery.cancel_scope.cancel(reason="the test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy.database.write, begin("next"))
        await trio.testing.wait_all_tasks_blocked()
        may_end.set()
    for run_id in ("given up", "next"):
        assert await busy.database.read(find_run, run_id) is not None


def test_a_change_that_was_given_up_may_outlast_the_program(tmp_path: Path) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    database = Database.open(f"sqlite:///{tmp_path / 'lumos.db'}")

    def slow(_: Connection) -> None:
        begun.set()
        assert may_end.wait(20)

    def make_together(changes: Sequence[Change]) -> Sequence[outcome.Outcome[Any]]:
        try:
            return database._make_together(changes)
        finally:
            ended.set()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(GroupedWrites(make_together).write, slow, may_give_up=True))
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel(reason="the test")

    trio.run(main)
    database.close()
    may_end.set()
    assert ended.wait(20)


async def test_without_a_thread_to_be_had_a_change_fails_and_the_next_does_not(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(trio.lowlevel, "start_thread_soon", cannot_start)
        waited = await write_all(busy, [begin(f"run-{number}") for number in range(MOST_AT_ONCE + 1)])
        assert all(isinstance(error, RuntimeError) for error in waited)
        with pytest.raises(RuntimeError):
            await busy.database.write(begin("at once"))
    assert await busy.database.write(begin("later")) == "later"
