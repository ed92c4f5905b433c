"""``docs/simulation.md`` says what there is: invariants, faults, a plan and its trace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from server.simulation.invariants import CHECKS
from server.simulation.plan import ClientAct, ToolManner, UpstreamFault
from server.simulation.plan_text import json_of, plan_of_json
from server.simulation.run_plan import simulate

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "simulation.md").read_text()


def test_the_page_has_every_invariant_as_its_check_says_it() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert rows == [(check.__name__, (check.__doc__ or "").strip()) for check in CHECKS]


def test_the_page_names_all_that_befalls_a_world() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    for names in (ClientAct, ToolManner, UpstreamFault):
        assert set(get_args(names)) <= named


def test_the_plan_of_the_page_goes_as_the_page_says() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    trace = PAGE.partition("`lumos simulate --plan plan.json` prints")[2].split("```")[1].lstrip("\n")
    plan = plan_of_json(text)
    assert json_of(plan) == text
    assert simulate(plan).trace == trace


def test_the_commands_of_the_page_are_there() -> None:
    assert "\nsimulate: " in (ROOT / "Makefile").read_text()
    assert "docs/simulation.md" in (ROOT / "README.md").read_text()
