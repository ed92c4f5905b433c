"""Plans as Python and as JSON: both give the plan back, and say no more than they must."""

from __future__ import annotations

import msgspec
import pytest

from server.simulation import plan as plans
from server.simulation.draw import draw
from server.simulation.plan import AgentPlan, AnswerPlan, ClientPlan, Plan, ReplyPlan, StepPlan, VendorPlan
from server.simulation.plan_text import code_of, json_of, paste_of, plan_of_json

SEEDS = range(100)

PASTED = """\
from __future__ import annotations

from server.simulation.plan import AnswerPlan, ClientPlan, Plan, ReplyPlan, StepPlan, VendorPlan
from server.simulation.run_plan import simulate


def test_seed_7() -> None:
    plan = Plan(
        seed=7,
        vendors=(
            VendorPlan(
                answers=(
                    AnswerPlan(reply=ReplyPlan(characters=3, alphabet="emoji", seconds=0.25, splits=8), fault="reset"),
                    AnswerPlan(),
                ),
            ),
        ),
        clients=(
            ClientPlan(
                agents=(0, 0), message="say \\"hi\\"", steps=(StepPlan(act="stop"), StepPlan(act="resume", after=0.0))
            ),
        ),
    )
    assert simulate(plan).violations == []
"""


def test_a_plan_becomes_a_test_as_a_formatter_would_have_it() -> None:
    reply = ReplyPlan(characters=3, alphabet="emoji", seconds=0.25, splits=8)
    steps = (StepPlan(act="stop"), StepPlan(act="resume", after=0.0))
    plan = Plan(
        seed=7,
        vendors=(VendorPlan(answers=(AnswerPlan(reply=reply, fault="reset"), AnswerPlan())),),
        agents=(AgentPlan(),),
        clients=(ClientPlan(agents=(0, 0), message='say "hi"', steps=steps),),
    )
    assert paste_of(plan) == PASTED


def test_a_small_plan_is_one_line() -> None:
    assert "    plan = Plan(seed=1, workers=2, shared=True)\n" in paste_of(Plan(seed=1, workers=2, shared=True))


@pytest.mark.parametrize("make", [code_of, json_of], ids=["code", "json"])
def test_what_is_read_again_is_the_same_plan(make: object) -> None:
    for plan in map(draw, SEEDS):
        if make is code_of:
            assert eval(code_of(plan), vars(plans)) == plan
        else:
            assert plan_of_json(json_of(plan)) == plan


def test_no_line_is_too_long() -> None:
    assert max(len(line) for seed in SEEDS for line in paste_of(draw(seed)).splitlines()) <= 120


def test_json_says_what_is_not_by_itself_so() -> None:
    assert json_of(Plan(seed=3, agents=(AgentPlan(), AgentPlan(retries=1)))) == (
        '{\n  "seed": 3,\n  "agents": [\n    {},\n    {\n      "retries": 1\n    }\n  ]\n}\n'
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": 1, "sed": 2}', '{"seed": 1, "agents": [{"tool": []}]}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        plan_of_json(text)
