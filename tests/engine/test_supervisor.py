"""The supervisor: runs that do not touch each other, found by id, kept for a while, drained at the end."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engine import (
    AgentStarted,
    AgentStopped,
    DrainingError,
    Emit,
    Error,
    GenerationComplete,
    Provider,
    ProviderError,
    RetentionLimits,
    Run,
    RunSpec,
    RunSupervisor,
)
from engine.supervisor import kept_bytes, random_run_id

from .scripted import (
    FOREVER,
    SENT,
    TIMESTAMP,
    WALL_TIME,
    Line,
    ProgrammedProvider,
    ScriptedProvider,
    WritingObserver,
    assert_ended_once,
    events_of,
    read_timed,
    spec_for,
    text,
)

SILENCE: Line = (FOREVER, ())


def lasting(seconds: float, provider: Provider | None = None) -> RunSpec:
    """A run that answers after so many seconds, with or without readers."""
    return spec_for(provider or ScriptedProvider((0, [SENT]), (seconds, text("answer"))), resume_grace=inf)


def numbered() -> Callable[[], str]:
    """Run ids r1, r2, …"""
    ids = iter(f"r{number}" for number in range(1, 1000))
    return lambda: next(ids)


# Runs beside each other


async def test_a_run_lives_in_the_supervisors_nursery_not_in_its_readers(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, wall_clock=lambda: WALL_TIME)
        with trio.move_on_after(1):
            run = supervisor.start(lasting(3))
            await read_timed(run.log)
        assert supervisor.active_runs == 1
        got = await read_timed(run.log)
        assert trio.current_time() == 3.0
        assert got[0][1] == events_of(run.log)[0]
        assert got[0][1] == AgentStarted("agent", run.id, TIMESTAMP)
        assert isinstance(run.log.terminal, GenerationComplete)


@pytest.mark.parametrize(
    "crash",
    [RuntimeError("bug"), ExceptionGroup("", [ValueError()]), ProviderError("upstream.server", "no"), AssertionError()],
    ids=lambda crash: type(crash).__name__,
)
async def test_a_crash_touches_no_other_run(autojump_clock: MockClock, crash: Exception) -> None:
    observer = WritingObserver()
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, observer)
        before, healthy = supervisor.start(lasting(5)), supervisor.start(lasting(6))
        crashing = supervisor.start(lasting(0, ScriptedProvider((1, text("a")), (2, crash))))
        await trio.sleep(3)
        after = supervisor.start(lasting(1))
    for run in (before, healthy, after):
        assert_ended_once(run)
        assert isinstance(run.log.terminal, GenerationComplete)
    assert_ended_once(crashing)
    assert isinstance(crashing.log.terminal, Error)
    assert crashing.elapsed == 2.0
    assert len(observer.bugs) == (0 if isinstance(crash, ProviderError) else 1)


async def test_a_crash_in_the_cleanup_of_a_stopped_run_touches_no_other(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("in cleanup")

    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        healthy = supervisor.start(lasting(5))
        crashing = supervisor.start(lasting(0, ProgrammedProvider(answer)))
        await trio.sleep(2)
        crashing.stop()
    assert isinstance(healthy.log.terminal, GenerationComplete)
    assert crashing.log.terminal == AgentStopped("requested", "", None)


async def test_nothing_is_left_in_the_nursery_after_the_end(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        runs = [supervisor.start(lasting(seconds)) for seconds in (1, 2, 3)]
        for left in (3, 2, 1, 0):
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == supervisor.active_runs == left
            await trio.sleep(1)
        assert [run.elapsed for run in runs] == [1.0, 2.0, 3.0]


async def test_the_runs_of_a_cancelled_nursery_are_interrupted(autojump_clock: MockClock) -> None:
    with trio.move_on_after(2):
        async with trio.open_nursery() as nursery:
            supervisor = RunSupervisor(nursery)
            runs = [supervisor.start(lasting(5)) for _ in range(3)]
            await trio.sleep_forever()
    for run in runs:
        assert_ended_once(run)
        assert isinstance(run.log.terminal, Error)
        assert run.log.terminal.code == "interrupted"
        assert supervisor.find(run.id) is run


async def test_a_run_started_as_the_nursery_is_cancelled_still_ends(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(SILENCE)
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        nursery.cancel_scope.cancel()
        run = supervisor.start(lasting(0, provider))
    assert_ended_once(run)
    assert isinstance(run.log.terminal, Error)
    assert supervisor.active_runs == 0


async def test_a_closed_nursery_takes_no_run_and_keeps_none(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
    with pytest.raises(RuntimeError, match="closed"):
        supervisor.start(lasting(1))
    assert supervisor.active_runs == 0


async def test_a_run_stopped_in_the_tick_of_its_start_asks_no_model(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(SILENCE)
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run = supervisor.start(lasting(0, provider))
        assert run.stop() is True
    assert_ended_once(run)
    assert provider.seen == []
    assert supervisor.find(run.id) is run


# Ids


def test_run_ids_are_22_url_safe_characters_and_never_the_same() -> None:
    ids = [random_run_id() for _ in range(2000)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", run_id) for run_id in ids)
    assert len(set(ids)) == len(ids)


async def test_each_run_has_its_own_id_in_its_own_events(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        runs = [supervisor.start(lasting(1)) for _ in range(100)]
    assert len({run.id for run in runs}) == 100
    for run in runs:
        assert re.fullmatch(r"[A-Za-z0-9_-]{22}", run.id)
        start = events_of(run.log)[0]
        assert isinstance(start, AgentStarted)
        assert start.run_id == run.id
        assert all(b"id: %s." % run.id.encode() in entry.frame for entry in run.log.entries())


# Find and forget


async def test_a_run_is_found_while_it_runs_and_after_its_end(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, new_run_id=numbered())
        first, second = supervisor.start(lasting(1)), supervisor.start(lasting(2))
        assert (supervisor.find("r1"), supervisor.find("r2"), supervisor.find("r3")) == (first, second, None)
    assert (supervisor.find("r1"), supervisor.find("r2"), supervisor.find("")) == (first, second, None)


async def test_to_forget_a_running_run_stops_it(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider((0, text("a")), SILENCE)
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, new_run_id=numbered())
        run, other = supervisor.start(lasting(0, provider)), supervisor.start(lasting(5))
        await trio.sleep(1)
        supervisor.forget(run)
        assert supervisor.find("r1") is None
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == supervisor.active_runs == 1
        supervisor.forget(run)
        assert supervisor.find("r1") is None
    assert isinstance(run.log.terminal, AgentStopped)
    assert provider.seen[-1] == (1.0, "cancelled")
    assert isinstance(other.log.terminal, GenerationComplete)
    assert supervisor.find("r1") is None


async def test_to_forget_an_ended_run_drops_its_log_alone(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, new_run_id=numbered())
        first, second = supervisor.start(lasting(1)), supervisor.start(lasting(2))
    supervisor.forget(first)
    supervisor.forget(first)
    assert (supervisor.find("r1"), supervisor.find("r2")) == (None, second)
    assert isinstance(first.log.terminal, GenerationComplete)


# Retention


async def test_an_ended_run_is_kept_so_many_seconds(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, retention=RetentionLimits(seconds=10), new_run_id=numbered())
        first, second = supervisor.start(lasting(2)), supervisor.start(lasting(4))
    await trio.sleep_until(11.875)
    assert (supervisor.find("r1"), supervisor.find("r2")) == (first, second)
    await trio.sleep_until(12)
    assert (supervisor.find("r1"), supervisor.find("r2")) == (None, second)
    await trio.sleep_until(14)
    assert supervisor.find("r2") is None


async def test_a_running_run_is_kept_however_long_it_takes(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, retention=RetentionLimits(seconds=1, bytes=1), new_run_id=numbered())
        run = supervisor.start(lasting(20))
        await trio.sleep(19)
        assert supervisor.find("r1") is run


async def test_ended_runs_are_kept_up_to_so_many_bytes_the_newest_of_them(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        sizing = RunSupervisor(nursery, new_run_id=lambda: "r0").start(lasting(1))
    size = kept_bytes(sizing)
    async with trio.open_nursery() as nursery:
        limits = RetentionLimits(seconds=1000, bytes=3 * size)
        supervisor = RunSupervisor(nursery, retention=limits, new_run_id=numbered())
        for _ in range(7):
            run = supervisor.start(lasting(1))
            await trio.sleep(2)
            assert kept_bytes(run) == size
        kept = [f"r{number}" for number in range(1, 8) if supervisor.find(f"r{number}")]
        assert kept == ["r5", "r6", "r7"]
        supervisor.forget(run)
        supervisor.start(lasting(1))
        await trio.sleep(2)
        kept = [f"r{number}" for number in range(1, 9) if supervisor.find(f"r{number}")]
        assert kept == ["r5", "r6", "r8"]


async def test_forgotten_and_expired_runs_leave_no_bytes_counted(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, retention=RetentionLimits(seconds=10))
        runs = [supervisor.start(lasting(1)) for _ in range(5)]
        stopped = supervisor.start(lasting(9))
        await trio.sleep(2)
        supervisor.forget(runs[2])
        supervisor.forget(stopped)
    assert supervisor._ended_bytes == sum(kept_bytes(run) for run in runs) - kept_bytes(runs[2])
    await trio.sleep(10)
    assert supervisor.find(runs[0].id) is None
    assert supervisor._ended_bytes == 0
    assert supervisor._ended == supervisor._active == {}


async def test_a_reader_of_a_dropped_run_reads_on(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, retention=RetentionLimits(seconds=1))
        run = supervisor.start(lasting(1))
    await trio.sleep(5)
    assert supervisor.find(run.id) is None
    assert [event for _, event in await read_timed(run.log)] == events_of(run.log)


# Drain


async def test_a_drain_of_nothing_is_over_at_once(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        await supervisor.drain(30)
        assert trio.current_time() == 0.0
        assert supervisor.draining
        with pytest.raises(DrainingError):
            supervisor.start(lasting(1))


async def test_a_drain_lets_runs_finish_and_waits_no_longer_than_for_the_last(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        runs = [supervisor.start(lasting(seconds)) for seconds in (1, 5, 9)]
        await trio.sleep(2)
        await supervisor.drain(30)
        assert trio.current_time() == 9.0
        assert (supervisor.active_runs, len(nursery.child_tasks)) == (0, 0)
    assert all(isinstance(run.log.terminal, GenerationComplete) for run in runs)


async def test_a_drain_ends_the_rest_when_its_time_is_over(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider((0, text("so far")), SILENCE)
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        quick, slow = supervisor.start(lasting(3)), supervisor.start(lasting(0, provider))
        await trio.sleep(1)
        await supervisor.drain(10)
        assert trio.current_time() == 11.0
        assert slow.log.ended, "when the drain returns, every log has its end"
    assert isinstance(quick.log.terminal, GenerationComplete)
    assert_ended_once(slow)
    assert isinstance(slow.log.terminal, Error)
    assert (slow.log.terminal.code, slow.log.terminal.response) == ("draining", "so far")
    assert provider.seen[-1] == (11.0, "cancelled")


async def test_while_draining_no_run_is_started_but_runs_are_found_and_read(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run = supervisor.start(lasting(5))
        nursery.start_soon(supervisor.drain, 30)
        await trio.sleep(1)
        with pytest.raises(DrainingError):
            supervisor.start(lasting(1))
        assert supervisor.find(run.id) is run
        assert isinstance((await read_timed(run.log))[-1][1], GenerationComplete)
        assert trio.current_time() == 5.0


async def test_a_drain_without_patience_ends_even_a_run_that_has_just_begun(autojump_clock: MockClock) -> None:
    provider = ScriptedProvider(SILENCE)
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run = supervisor.start(lasting(0, provider))
        await supervisor.drain(0)
        assert run.log.ended
    assert_ended_once(run)
    assert isinstance(run.log.terminal, Error)
    assert run.log.terminal.code == "draining"


async def test_a_second_drain_hurries_the_first(autojump_clock: MockClock) -> None:
    """As a second SIGTERM does: both return as soon as nothing is left."""
    returned: list[float] = []
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        supervisor.start(lasting(0, ScriptedProvider((0, [SENT]), SILENCE)))

        async def drain(after: float, seconds: float) -> None:
            await trio.sleep(after)
            await supervisor.drain(seconds)
            returned.append(trio.current_time())

        nursery.start_soon(drain, 1, 25)
        nursery.start_soon(drain, 3, 2)
    assert returned == [5.0, 5.0]


async def test_a_drain_after_an_idle_time_still_waits(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        supervisor.start(lasting(1))
        await trio.sleep(2)
        supervisor.start(lasting(1))
        await supervisor.drain(30)
        assert trio.current_time() == 3.0


async def test_a_cancelled_drain_goes_on_refusing(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run = supervisor.start(lasting(5))
        with trio.move_on_after(1):
            await supervisor.drain(30)
        assert not run.log.ended
        with pytest.raises(DrainingError):
            supervisor.start(lasting(1))


async def test_to_forget_the_last_run_ends_the_drain(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery)
        run: Run = supervisor.start(lasting(0, ScriptedProvider(SILENCE)))

        async def forget() -> None:
            await trio.sleep(2)
            supervisor.forget(run)

        nursery.start_soon(forget)
        await supervisor.drain(30)
        assert trio.current_time() == 2.0
