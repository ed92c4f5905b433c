"""Connections that wait for a request, all with the same limit, closed by one task."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from server.idling import Idling


class Waiter:
    """Notes when it was closed."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, str]] = []

    def end(self, reason: str) -> None:
        """For the idling."""
        self.ended.append((trio.current_time(), reason))


async def test_each_is_closed_when_its_own_time_is_over(autojump_clock: MockClock) -> None:
    idling, waiters = Idling(10), [Waiter() for _ in range(3)]
    with trio.move_on_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idling.run)
            for waiter in waiters:
                await trio.sleep(4)
                idling.add(waiter)
    assert [[at for at, _ in waiter.ended] for waiter in waiters] == [[14], [18], [22]]


async def test_who_comes_again_has_all_its_time_again_and_who_left_is_let_be(autojump_clock: MockClock) -> None:
    idling, again, left, other = Idling(10), Waiter(), Waiter(), Waiter()
    with trio.move_on_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idling.run)
            for waiter in (again, left, other):
                idling.add(waiter)
            await trio.sleep(9)
            idling.discard(left)
            idling.discard(left)
            idling.add(again)
    assert [[at for at, _ in waiter.ended] for waiter in (again, left, other)] == [[19], [], [10]]


async def test_after_a_time_without_any_the_next_one_is_closed_in_time(autojump_clock: MockClock) -> None:
    idling, waiters = Idling(10), [Waiter(), Waiter()]
    with trio.move_on_after(200):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idling.run)
            for waiter in waiters:
                await trio.sleep(50)
                idling.add(waiter)
    assert [[at for at, _ in waiter.ended] for waiter in waiters] == [[60], [110]]


async def test_all_can_be_closed_at_once(autojump_clock: MockClock) -> None:
    idling, waiters = Idling(10), [Waiter(), Waiter()]
    for waiter in waiters:
        idling.add(waiter)
    idling.end_all("the end")
    assert [waiter.ended for waiter in waiters] == [[(0, "the end")]] * 2
