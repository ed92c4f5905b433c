"""Limits of keys: the exact times to come back, places given back once, tokens of the UTC day."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import inf

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from engine import DrainingError, ModelRequest, Run, RunSpec, RunSupervisor, Usage
from server.availability import STORE_SECONDS
from server.errors import ApiError
from server.limits import KeyLimiter, RunSlot
from server.principal import LOCAL_USER, KeyLimits, Principal
from tests.engine.scripted import ScriptedProvider, text
from tests.server.doors import CountingStore, open_door

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def limited(key_id: str = "k", **of: float) -> Principal:
    return Principal(tenant_id="t", user_id="u", key_id=key_id, limits=KeyLimits(**of))


def wall_clock(start: datetime = NOON) -> Callable[[], datetime]:
    """A wall clock that goes with trio's."""
    return lambda: start + timedelta(seconds=trio.current_time())


class Counter(CountingStore):
    """A store in which each key has used so many tokens."""

    def __init__(self, **used: int) -> None:
        super().__init__()
        self.database.close()
        self.used = used
        self.asked: list[tuple[str, str]] = []

    async def read(self, query: Callable[..., object], *args: object) -> object:  # type: ignore[override]
        key_id, since = map(str, args)
        self.asked.append((key_id, since))
        await trio.sleep(self.seconds)
        return self.used.get(key_id, 0)


def limiter(store: CountingStore | None = None, start: datetime = NOON) -> KeyLimiter:
    return KeyLimiter(store or Counter(), wall_clock(start))


def refusal(error: ApiError) -> int:
    """Seconds until the client may come back, said the same in header and body."""
    assert (error.status, error.code) == (429, "RATE_LIMITED")
    assert error.headers == {"Retry-After": str(error.details["retry_after"])}
    seconds: int = error.details["retry_after"]
    assert seconds >= 1
    return seconds


def request_wait(counter: KeyLimiter, principal: Principal) -> int:
    """0 if the request counts, else the seconds to wait."""
    try:
        counter.count_request(principal)
    except ApiError as error:
        return refusal(error)
    return 0


# Requests a minute


async def test_a_minutes_worth_at_once_then_one_at_a_time(autojump_clock: MockClock) -> None:
    counter, principal = limiter(), limited(requests_per_minute=6)
    assert [request_wait(counter, principal) for _ in range(8)] == [0] * 6 + [10, 10]
    await trio.sleep(9.5)
    assert request_wait(counter, principal) == 1
    await trio.sleep(0.5)
    assert [request_wait(counter, principal) for _ in range(2)] == [0, 10]
    await trio.sleep(25)
    assert [request_wait(counter, principal) for _ in range(3)] == [0, 0, 5]
    await trio.sleep(1000)
    assert [request_wait(counter, principal) for _ in range(7)] == [0] * 6 + [10]


async def test_requests_that_come_evenly_are_never_refused(autojump_clock: MockClock) -> None:
    counter, principal = limiter(), limited(requests_per_minute=7)
    for _ in range(500):
        assert request_wait(counter, principal) == 0
        await trio.sleep(60 / 7)


@settings(max_examples=60, deadline=None)
@given(limit=st.floats(min_value=0.1, max_value=10_000), pauses=st.lists(st.floats(0, 90), max_size=20))
def test_who_waits_as_told_is_let_in(limit: float, pauses: list[float]) -> None:
    """And is told no more than a second too much; and a minute never holds more than the bucket and its refill."""

    async def main() -> None:
        counter, principal = limiter(), limited(requests_per_minute=limit)
        counted: list[float] = []
        for pause in [*pauses, 0.0, 0.0]:
            await trio.sleep(pause)
            wait = request_wait(counter, principal)
            if wait:
                await trio.sleep(wait - 1)
                assert wait == 1 or request_wait(counter, principal) == 1
                await trio.sleep(1)
                assert request_wait(counter, principal) == 0
            counted.append(trio.current_time())
        for start in counted:
            assert sum(start <= at < start + 60 for at in counted) <= 2 * max(limit, 1) + 1

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_keys_do_not_use_up_each_others_requests(autojump_clock: MockClock) -> None:
    counter = limiter()
    for key_id in ("a", "b"):
        assert [request_wait(counter, limited(key_id, requests_per_minute=1)) for _ in range(2)] == [0, 60]


async def test_nobody_is_limited_without_a_limit(autojump_clock: MockClock) -> None:
    counter = limiter()
    for principal in (LOCAL_USER, limited()):
        for _ in range(1000):
            counter.count_request(principal)
            counter.run_slot(principal)
            await counter.check_tokens(principal)
    assert counter._due == {}


async def test_memory_holds_the_keys_of_the_last_minute(autojump_clock: MockClock) -> None:
    counter = limiter()
    for number in range(1000):
        counter.count_request(limited(f"k{number}", requests_per_minute=100))
    await trio.sleep(60)
    counter.count_request(limited("last", requests_per_minute=100))
    assert list(counter._due) == ["last"]


async def test_over_http_the_limit_is_429_with_retry_after(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, key = await door.store.add_key(limits=KeyLimits(requests_per_minute=2))
        assert [(await door.who(key)).status_code for _ in range(2)] == [200, 200]
        response = await door.who(key)
        assert (response.status_code, response.headers["Retry-After"]) == (429, "30")
        assert response.json()["message"] == "this key may make 2 requests a minute"
        await trio.sleep(30)
        assert (await door.who(key)).status_code == 200


async def test_limits_are_told_as_whole_numbers_and_one_of_them_as_one() -> None:
    counter, principal = limiter(), limited(concurrent_runs=1, requests_per_minute=1)
    counter.run_slot(principal)
    with pytest.raises(ApiError, match=r"^this key may have 1 run at once$"):
        counter.run_slot(principal)
    counter.count_request(principal)
    with pytest.raises(ApiError, match=r"^this key may make 1 request a minute$"):
        counter.count_request(principal)
    stored = msgspec.json.encode(KeyLimits(concurrent_runs=1, tokens_per_day=1_000_000))
    assert repr(msgspec.json.decode(stored, type=KeyLimits).concurrent_runs) == "1"
    assert repr(msgspec.json.decode(stored, type=KeyLimits).tokens_per_day) == "1000000"


# Runs at once


async def test_runs_at_once_are_refused_past_the_limit() -> None:
    counter, principal = limiter(), limited(concurrent_runs=2)
    slots = [counter.run_slot(principal) for _ in range(2)]
    with pytest.raises(ApiError) as refused:
        counter.run_slot(principal)
    assert refusal(refused.value) == 5
    counter.run_slot(limited("another", concurrent_runs=2))
    slots[0].close()
    counter.run_slot(principal)
    with pytest.raises(ApiError):
        counter.run_slot(principal)


async def test_a_place_is_given_back_once() -> None:
    counter, principal = limiter(), limited(concurrent_runs=2)
    first, second = counter.run_slot(principal), counter.run_slot(principal)
    for _ in range(5):
        first.close()
    third = counter.run_slot(principal)
    with pytest.raises(ApiError):
        counter.run_slot(principal)
    for slot in (second, third, first):
        slot.close()
    assert counter._runs == {}


def spec(provider: ScriptedProvider, slot: RunSlot, resume_grace: float = 5.0) -> RunSpec:
    return RunSpec(
        agent_id="a",
        provider=provider,
        request=ModelRequest((), "m"),
        resume_grace=resume_grace,
        on_ended=slot.run_ended,
    )


@pytest.mark.parametrize("end", ["done", "stopped", "forgotten", "never read", "crashed", "drained", "cancelled"])
async def test_however_a_run_ends_its_place_is_free(end: str, autojump_clock: MockClock) -> None:
    counter, principal = limiter(), limited(concurrent_runs=1)
    script = {"done": (1, text("hi")), "crashed": (1, RuntimeError("a bug"))}.get(end, (inf, ()))
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run = supervisor.start(spec(ScriptedProvider(script), counter.run_slot(principal)))  # type: ignore[arg-type]
        await trio.sleep(0.5)
        with pytest.raises(ApiError):
            counter.run_slot(principal)
        match end:
            case "stopped":
                run.stop()
            case "forgotten":
                supervisor.forget(run)
            case "drained":
                await supervisor.drain(0)
            case "cancelled":
                nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.sleep(60)
        counter.run_slot(principal).close()
    assert counter._runs == {}


async def test_a_run_that_cannot_start_gives_its_place_back(autojump_clock: MockClock) -> None:
    counter, principal = limiter(), limited(concurrent_runs=1)
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        await supervisor.drain(0)
        slot = counter.run_slot(principal)
        with pytest.raises(DrainingError):
            supervisor.start(spec(ScriptedProvider(), slot))
        slot.close()
    counter.run_slot(principal)


# Tokens a day


def tokens(count: int) -> Usage:
    return Usage(count - 1, 1)


async def token_wait(counter: KeyLimiter, principal: Principal) -> int:
    try:
        await counter.check_tokens(principal)
    except ApiError as error:
        return refusal(error)
    return 0


async def test_tokens_are_refused_until_midnight_once_they_are_used_up(autojump_clock: MockClock) -> None:
    store = Counter(k=900)
    counter, principal = limiter(store), limited(tokens_per_day=1000)
    assert await token_wait(counter, principal) == 0
    counter.spend("k", tokens(99))
    assert await token_wait(counter, principal) == 0
    counter.spend("k", tokens(1))
    assert await token_wait(counter, principal) == 12 * 3600
    await trio.sleep(3600 + 0.25)
    assert await token_wait(counter, principal) == 11 * 3600
    await trio.sleep(11 * 3600 - 0.5)
    assert await token_wait(counter, principal) == 1
    await trio.sleep(0.25)
    assert await token_wait(counter, principal) == 0
    assert store.asked == [("k", "2026-11-22T00:00:00.000000+00:00")]
    counter.spend("k", tokens(1000))
    assert await token_wait(counter, principal) == 24 * 3600


async def test_a_day_is_utcs_wherever_the_clock_is(autojump_clock: MockClock) -> None:
    tokyo = NOON.replace(hour=20).astimezone(datetime.strptime("+0900", "%z").tzinfo)
    store = Counter(k=1)
    counter = limiter(store, tokyo)
    assert await token_wait(counter, limited(tokens_per_day=1)) == 4 * 3600
    assert store.asked == [("k", "2026-11-22T00:00:00.000000+00:00")]


async def test_a_run_that_ends_after_midnight_counts_for_the_new_day(autojump_clock: MockClock) -> None:
    counter, principal = limiter(Counter(k=9), NOON.replace(hour=23, minute=59)), limited(tokens_per_day=10)
    await counter.check_tokens(principal)
    slot = counter.run_slot(principal)
    await trio.sleep(120)
    counter.count_request(principal)
    counter.spend("k", tokens(10))
    slot.close()
    assert await token_wait(counter, principal) == 24 * 3600 - 60


async def test_first_uses_at_once_ask_the_store_once(autojump_clock: MockClock) -> None:
    store = Counter(k=1)
    store.seconds = 1
    counter, principal = limiter(store), limited(tokens_per_day=1)
    waits = []

    async def ask() -> None:
        waits.append(await token_wait(counter, principal))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
    assert waits == [12 * 3600 - 1] * 10
    assert len(store.asked) == 1


async def test_a_store_that_hangs_is_503(autojump_clock: MockClock) -> None:
    store = Counter()
    store.seconds = 1000
    with pytest.raises(ApiError) as refused:
        await limiter(store).check_tokens(limited(tokens_per_day=1))
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "5"})
    assert trio.current_time() == STORE_SECONDS


async def test_a_runs_tokens_count_when_it_ends(autojump_clock: MockClock) -> None:
    counter, principal = limiter(), limited(tokens_per_day=1)
    await counter.check_tokens(principal)
    slot = counter.run_slot(principal)
    run = Run("r", spec(ScriptedProvider((1, text("hello"))), slot))
    await run.execute()
    assert run.usage is not None
    assert counter._days["k"].tokens == run.usage.input_tokens + run.usage.output_tokens > 0
    slot.run_ended(run)
    assert counter._days["k"].tokens == run.usage.input_tokens + run.usage.output_tokens, "not twice"


async def test_days_that_are_over_are_forgotten(autojump_clock: MockClock) -> None:
    counter = limiter()
    for number in range(100):
        await counter.check_tokens(limited(f"k{number}", tokens_per_day=5))
    running = counter.run_slot(limited("k7", tokens_per_day=5))
    await trio.sleep(12 * 3600)
    counter.count_request(limited("k1"))
    assert list(counter._days) == ["k7"]
    running.close()
    counter.spend("k1", tokens(1))  # of a run that nobody counts: the store will tell


async def test_what_the_store_has_is_the_days_runs_of_the_key(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        counter = KeyLimiter(door.store, wall_clock())
        assert await token_wait(counter, limited(tokens_per_day=1)) == 0
        assert [query for query, _ in door.store.reads] == ["tokens_used_since"]
