"""``lumos simulate``: a trace that is the same each time, a summary, plans to keep, and what fails made smaller."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest

from server.simulation import run_plan
from server.simulation.draw import draw
from server.simulation.plan import AnswerPlan, ClientPlan, EventPlan, Plan, VendorPlan
from server.simulation.plan_text import json_of, paste_of, plan_of_json
from server.simulation.run_plan import simulate
from tests.server.commands import complaint, lumos

SMALL = Plan(
    seed=3,
    vendors=(VendorPlan(answers=(AnswerPlan(fault="cut"),)),),
    clients=(ClientPlan(), ClientPlan(at=1.5)),
    events=(EventPlan(at=20.0, act="burst", number=1),),
    until=40.0,
)


def has_cut(plan: Plan) -> bool:
    return any(answer.fault == "cut" for vendor in plan.vendors for answer in vendor.answers)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A plan in a file."""
    path = tmp_path / "plan.json"
    path.write_text(json_of(SMALL))
    return path


@pytest.fixture
def cuts_are_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invariant that no world with a certain fault can keep."""

    def check(plan: Plan, _: object) -> list[str]:
        return ["nothing_is_cut: it was"] if has_cut(plan) else []

    monkeypatch.setattr(run_plan, "check", check)


def test_a_seed_s_trace_is_printed_and_its_figures_beside_it() -> None:
    shown = lumos("simulate", "--seed", "5")
    outcome = simulate(draw(5))
    assert shown.exit_code == 0
    assert shown.stdout == outcome.trace
    first, second, third, *_ = shown.stderr.splitlines()
    assert first.startswith("0 failed of 1 world, ")
    assert second.endswith(" ms of CPU for each world")
    assert third.startswith("virtual time went ")


def test_a_plan_that_was_kept_goes_as_its_seed_does(tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    kept.write_text(lumos("simulate", "--seed", "5", "--show-plan").stdout)
    assert plan_of_json(kept.read_text()) == draw(5)
    assert lumos("simulate", "--plan", kept).stdout == simulate(draw(5)).trace


def test_many_seeds_are_counted() -> None:
    shown = lumos("simulate", "--seeds", "20-24", "--jobs", "1")
    assert shown.exit_code == 0
    assert shown.stdout == ""
    assert shown.stderr.startswith("0 failed of 5 worlds, ")


@pytest.mark.usefixtures("cuts_are_forbidden")
def test_seeds_that_fail_are_told_with_what_they_violate() -> None:
    bad = next(seed for seed in count() if has_cut(draw(seed)))
    shown = lumos("simulate", "--seeds", f"{bad - 1}-{bad + 9}", "--jobs", "1", "--failures", "1")
    assert shown.exit_code == 1
    first, second, third, *_ = shown.stderr.splitlines()
    assert first == f"seed {bad} fails:"
    assert second == "  nothing_is_cut: it was"
    assert third.startswith("1 failed of 2 worlds, ")
    assert lumos("simulate", "--seed", str(bad)).exit_code == 1


@pytest.mark.usefixtures("cuts_are_forbidden")
def test_a_plan_that_fails_becomes_a_small_test(small: Path) -> None:
    shown = lumos("simulate", "--plan", small, "--shrink")
    least = Plan(seed=3, vendors=SMALL.vendors)
    assert shown.exit_code == 1
    assert shown.stdout == paste_of(least)
    assert shown.stderr.splitlines()[1:] == ["  nothing_is_cut: it was"]
    assert lumos("simulate", "--plan", small, "--shrink", "--show-plan").stdout == json_of(least)


def test_a_plan_that_goes_well_is_not_made_smaller(small: Path) -> None:
    shown = lumos("simulate", "--plan", small, "--shrink")
    assert shown.exit_code == 0
    assert shown.stdout == ""
    assert shown.stderr == "nothing is violated: there is nothing to shrink\n"


@pytest.mark.parametrize(
    "arguments",
    [(), ("--seed", "1", "--seeds", "2"), ("--seeds", "2", "--shrink"), ("--seeds", "5-4"), ("--seed", "-1")],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...]) -> None:
    assert lumos("simulate", *arguments).exit_code == 2


@pytest.mark.parametrize("text", ["{", '{"seed": 1, "worlds": 2}'])
def test_a_file_that_is_no_plan_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert complaint(lumos("simulate", "--plan", path)).startswith(f"{path}: ")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    assert complaint(lumos("simulate", "--plan", path)) == f"{path}: No such file or directory"


def test_without_its_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("server.simulation.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("server.simulation.telling", raising=False)
    monkeypatch.setitem(sys.modules, "lupa", None)
    assert complaint(lumos("simulate", "--seed", "1")) == (
        "to simulate needs what `pip install 'lumos-stream[simulate]'` adds: there is no lupa"
    )
