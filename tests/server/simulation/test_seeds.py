"""Worlds of seeds: all is well in a hundred and a half of them, in whatever order and process they are acted."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from server.simulation import seeds as seeds_module
from server.simulation.draw import draw
from server.simulation.plan import Plan
from server.simulation.run_plan import Outcome, simulate
from server.simulation.seeds import Figures, Verdict, cores, judge_seeds, seeds_of, simulate_within, verdict_of

SEEDS = range(7000, 7150)
"""Fixed, so that a change either breaks one of them or none."""


@cache
def judged(seed: int) -> Verdict:
    """Acted in this process, once."""
    return verdict_of(simulate_within(draw(seed)))


@pytest.mark.parametrize("first", SEEDS[::25])
def test_nothing_is_violated(first: int) -> None:
    verdicts = map(judged, range(first, first + 25))
    assert {verdict.seed: verdict.violations for verdict in verdicts if verdict.violations} == {}


def test_they_have_something_of_everything() -> None:
    kinds: Counter[str] = sum((judged(seed).kinds for seed in SEEDS), Counter())
    assert len([kind for kind in kinds if kind.startswith("upstream ")]) > 15
    assert len([kind for kind in kinds if kind.startswith("client ")]) > 12
    assert len([kind for kind in kinds if kind.startswith("world ")]) > 6


def test_a_world_lasts_for_some_minutes_of_its_time() -> None:
    assert sum(judged(seed).virtual_seconds for seed in SEEDS) / len(SEEDS) > 300


@pytest.mark.parametrize("place", [0, 49, 149])
def test_a_world_goes_the_same_way_after_whatever_others(place: int) -> None:
    """The first of the process, one in between and the last: each now comes behind all the others."""
    seed = SEEDS[place]
    assert verdict_of(simulate(draw(seed))).digest == judged(seed).digest


def test_processes_tell_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds_module, "CHUNK", 2)
    told: list[int] = []
    figures = judge_seeds(SEEDS[:11], 2, 1, lambda so_far: told.append(so_far.worlds))
    expected = Figures()
    for seed in SEEDS[:11]:
        expected.add(judged(seed))
    assert told == list(range(1, 12))
    assert figures.digest == expected.digest
    assert (figures.worlds, figures.runs, figures.events) == (11, expected.runs, expected.events)
    assert figures.kinds == expected.kinds
    assert figures.virtual_seconds == expected.virtual_seconds
    assert figures.failed == []


@pytest.fixture
def acted_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that were judged; every third world fails, and none is really acted."""
    acted: list[int] = []

    def act(plan: Plan) -> Outcome:
        acted.append(plan.seed)
        violations = [f"some_check: seed {plan.seed}"] if plan.seed % 3 == 0 else []
        return Outcome(plan=plan, trace="", violations=violations, observations=NOTHING.observations)

    monkeypatch.setattr(seeds_module, "simulate_within", act)
    return acted


NOTHING = simulate(Plan(seed=0, clients=(), until=1.0))


def test_it_ends_with_the_first_failures(acted_seeds: list[int]) -> None:
    figures = judge_seeds(range(4, 100), 1, 2)
    assert [verdict.seed for verdict in figures.failed] == [6, 9]
    assert acted_seeds == [4, 5, 6, 7, 8, 9]
    assert figures.failed[0].violations == ["some_check: seed 6"]


def test_a_world_that_never_asks_trio_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr("server.simulation.world.World._happen", loop)
    plan = draw(next(seed for seed in range(100) if draw(seed).events))
    (violation,) = simulate_within(plan, cpu_seconds=0.3).violations
    assert violation.startswith("the world broke down")
    assert "EndlessWorldError: 0.3 s of CPU were not enough" in violation
    monkeypatch.undo()
    assert simulate_within(plan).violations == []


def test_seeds_are_a_number_or_a_range() -> None:
    assert seeds_of("1000") == range(1000)
    assert seeds_of("5000-5999") == range(5000, 6000)
    assert seeds_of("7-7") == range(7, 8)


@pytest.mark.parametrize("text", ["", "0", "x", "-5", "9-8", "1-x"])
def test_what_are_no_seeds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|no seeds"):
        seeds_of(text)


def test_there_is_a_core_at_least() -> None:
    assert cores() >= 1
