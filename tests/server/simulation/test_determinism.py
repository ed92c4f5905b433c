"""The same seed gives the same world, in any process; another seed another one; nothing is left changed."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import hypercorn.config
import pytest
import trio
from trio._core import _run as trio_loop

import engine.supervisor
from engine.run import utc_now
from server.simulation import determinism
from server.simulation.determinism import EPOCH, Chance, StuckError, determined, run
from server.simulation.plan import AnswerPlan, ClientPlan, EventPlan, Plan, ReplyPlan, VendorPlan
from server.simulation.run_plan import simulate
from tests.server.simulation.stand_ins import READERS

ROOT = Path(__file__).parents[3]

SEVERAL = Plan(
    seed=3,
    workers=2,
    shared=True,
    keyed=True,
    latency=0.05,
    vendors=(VendorPlan(answers=(AnswerPlan(fault="status_500"), AnswerPlan(reply=ReplyPlan(pieces=5)))),),
    clients=(ClientPlan(user=1), ClientPlan(user=2, at=0.3, worker=1), ClientPlan(user=1, at=0.3)),
    events=(EventPlan(at=1.0, act="burst", number=3), EventPlan(at=1.5, act="kill", number=1)),
    until=30.0,
)
"""A world with something of everything that is left to chance."""

PROGRAM = """
from server.simulation.run_plan import simulate
from tests.server.simulation.stand_ins import READERS
from tests.server.simulation.test_determinism import SEVERAL
import sys
sys.stdout.write(simulate(SEVERAL, READERS).trace)
"""


def begin_in_fresh_process(hash_seed: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_fresh_processes_go_the_same_way_whatever_hashes_are() -> None:
    processes = [begin_in_fresh_process(hash_seed) for hash_seed in ("1", "4242")]
    here = simulate(SEVERAL, READERS).trace
    traces = [process.communicate()[0] for process in processes]
    assert "event" in here
    assert traces == [here, here]


def test_one_process_goes_the_same_way_again() -> None:
    first = simulate(SEVERAL, READERS)
    simulate(Plan(seed=99), READERS)
    again = simulate(SEVERAL, READERS)
    assert again.trace == first.trace
    assert again.observations.output == first.observations.output


def test_another_seed_goes_another_way() -> None:
    plan = Plan(seed=1, until=10.0)
    other = Plan(seed=2, until=10.0)
    assert simulate(plan, READERS).trace != simulate(other, READERS).trace


def test_the_order_of_tasks_depends_on_the_seed_alone() -> None:
    async def order(_: Chance) -> list[int]:
        done: list[int] = []

        async def do(number: int) -> None:
            await trio.sleep(1)
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(do, number)
        return done

    orders = [run(order, seed) for seed in range(5)]
    assert orders == [run(order, seed) for seed in range(5)]
    assert len({tuple(one) for one in orders}) > 1


def test_time_begins_at_0_and_jumps_exactly() -> None:
    wanted = sorted(random.Random(1).uniform(0, 10**number) for number in range(8) for _ in range(50))

    async def sleep(_: Chance) -> list[float]:
        times = [trio.current_time()]
        for time in wanted:
            await trio.sleep_until(time)
            times.append(trio.current_time())
        return times

    assert run(sleep, 0) == [0.0, *wanted]


def test_wall_clocks_go_with_the_virtual_one() -> None:
    async def look(_: Chance) -> None:
        assert utc_now() == EPOCH
        await trio.sleep(90)
        assert (utc_now() - EPOCH).total_seconds() == 90
        assert hypercorn.config.time() == EPOCH.timestamp() + 90  # type: ignore[attr-defined]

    run(look, 0)


def test_ids_depend_on_the_seed_alone() -> None:
    async def make(_: Chance) -> str:
        await trio.lowlevel.checkpoint()
        return engine.supervisor.random_run_id()

    assert run(make, 1) == run(make, 1)
    assert run(make, 1) != run(make, 2)
    assert len(run(make, 1)) == len(engine.supervisor.random_run_id()) == 22


def test_everything_is_put_back() -> None:
    places = [(resolve_name(place), name) for place, name, _, _ in determinism._REPLACED]
    before = [getattr(place, name) for place, name in places]
    during: list[object] = []

    def fail() -> None:
        during.extend(getattr(place, name) for place, name in places)
        assert not gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), determined(Chance(1)):
        fail()
    assert not any(one is other for one, other in zip(before, during, strict=True) if one is not True)
    assert [getattr(place, name) for place, name in places] == before
    assert gc.isenabled()


def test_a_world_in_which_everybody_waits_for_ever_ends() -> None:
    async def wait(_: Chance) -> None:
        await trio.sleep_forever()

    with pytest.raises(StuckError, match="everybody waits for ever at 0"):
        run(wait, 0)


def test_a_world_that_spins_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism, "MAX_STEPS_WITHOUT_TIME", 1000)

    async def spin(_: Chance) -> None:
        while True:  # noqa: ASYNC110 - that is the matter
            await trio.lowlevel.checkpoint()

    with pytest.raises(StuckError, match="the world spins at 0"):
        run(spin, 0)


def test_trio_is_its_own_again_after_a_world() -> None:
    before = trio_loop._r
    run(_nothing, 0)
    assert trio_loop._r is before


async def _nothing(_: Chance) -> None:
    await trio.lowlevel.checkpoint()
