"""What happened in a world is counted by kinds."""

from __future__ import annotations

from server.simulation.kinds import kinds_of
from server.simulation.plan import AgentPlan, AnswerPlan, ClientPlan, EventPlan, Plan, ReplyPlan, StepPlan, ToolPlan
from server.simulation.plan import VendorPlan as Vendor
from server.simulation.run_plan import simulate


def test_everything_that_befalls_a_world_is_counted() -> None:
    calls = AnswerPlan(reply=ReplyPlan(tools=("clock",)))
    plan = Plan(
        seed=1,
        vendors=(Vendor(answers=(AnswerPlan(fault="refuse"), AnswerPlan(fault="status_503"), calls, AnswerPlan())),),
        tools=(ToolPlan(name="clock", manner="raises"),),
        agents=(AgentPlan(tools=("clock",)),),
        clients=(
            ClientPlan(steps=(StepPlan(act="state"), StepPlan(act="pause", seconds=0.1))),
            ClientPlan(manner="hostile", at=50.0),
        ),
        events=(EventPlan(at=40.0, act="sigterm"), EventPlan(at=45.0, act="start")),
        until=60.0,
    )
    outcome = simulate(plan)
    assert outcome.violations == []
    assert kinds_of(plan, outcome.trace) == {
        "upstream refuse": 1,
        "upstream status_503": 1,
        "tool raises": 1,
        "client state": 1,
        "client pause": 1,
        "client attacks": 1,
        "world sigterm": 1,
        "world start": 1,
    }


def test_where_nothing_befalls_nothing_is_counted() -> None:
    plan = Plan(seed=1, until=10.0)
    assert not kinds_of(plan, simulate(plan).trace)
