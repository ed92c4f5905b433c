"""The circuit breaker by itself: one probe at a time, and no verdict from requests of another time."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from providers.breaker import BreakerLimits, CircuitBreaker, Permit


def admitted(breaker: CircuitBreaker) -> Permit:
    permit = breaker.admit()
    assert permit is not None
    return permit


async def opened() -> tuple[CircuitBreaker, Permit]:
    """A breaker whose probe is due, and the permit of a request that began before it opened."""
    breaker = CircuitBreaker(BreakerLimits(failures=1, open_seconds=1))
    early = admitted(breaker)
    breaker.failed(admitted(breaker))
    assert breaker.admit() is None
    await trio.sleep(1)
    return breaker, early


async def test_an_early_request_that_ends_lets_no_second_probe_through(autojump_clock: MockClock) -> None:
    breaker, early = await opened()
    probe = admitted(breaker)
    breaker.released(early)
    assert breaker.admit() is None
    breaker.released(probe)
    assert breaker.admit() is not None


async def test_a_probe_that_was_released_lets_go_only_its_own_place(autojump_clock: MockClock) -> None:
    breaker, _ = await opened()
    first = admitted(breaker)
    breaker.released(first)
    admitted(breaker)
    breaker.released(first)
    assert breaker.admit() is None


async def test_the_success_of_an_early_request_does_not_close(autojump_clock: MockClock) -> None:
    breaker, early = await opened()
    breaker.succeeded(early)
    assert breaker.is_open
    admitted(breaker)
    breaker.succeeded(early)
    assert breaker.admit() is None


async def test_the_failure_of_an_early_request_does_not_keep_it_open_longer(autojump_clock: MockClock) -> None:
    breaker, early = await opened()
    breaker.failed(early)
    assert breaker.seconds_to_probe == 0
    admitted(breaker)
    breaker.failed(early)
    assert breaker.admit() is None


async def test_the_failure_of_an_early_request_does_not_open_again(autojump_clock: MockClock) -> None:
    breaker, early = await opened()
    breaker.succeeded(admitted(breaker))
    breaker.failed(early)
    assert not breaker.is_open


async def test_a_probe_that_fails_opens_again(autojump_clock: MockClock) -> None:
    breaker, _ = await opened()
    probe = admitted(breaker)
    breaker.failed(probe)
    breaker.released(probe)
    assert (breaker.admit(), breaker.seconds_to_probe) == (None, 1.0)


async def test_a_probe_that_answered_and_then_broke_off_counts_as_a_failure(autojump_clock: MockClock) -> None:
    breaker, _ = await opened()
    probe = admitted(breaker)
    breaker.succeeded(probe)
    assert breaker.admit() is not None
    breaker.failed(probe)
    assert breaker.is_open
