"""A plan that fails becomes small, stays one that can be acted, and fails in the same way to the end."""

from __future__ import annotations

from itertools import count, islice
from math import inf
from typing import Any

import pytest

from engine import Error
from engine.events import Event, encode_frame
from engine.log import LogEntry, RunLog
from server.simulation.draw import draw
from server.simulation.plan import (
    AgentPlan,
    AnswerPlan,
    ClientPlan,
    EventPlan,
    Plan,
    ReplyPlan,
    StepPlan,
    ToolPlan,
    VendorPlan,
)
from server.simulation.plan_text import paste_of
from server.simulation.run_plan import simulate
from server.simulation.shrink import failing, shrink, smaller

FAILING = Plan(
    seed=9,
    keyed=True,
    resume_grace=1.0,
    queue_seconds=1.347,
    vendors=(
        VendorPlan(wire="gemini", answers=(AnswerPlan(reply=ReplyPlan(characters=400, pieces=9)),)),
        VendorPlan(answers=(AnswerPlan(), AnswerPlan(fault="bad_json", where=0.513, seconds=0.1))),
    ),
    tools=(ToolPlan(name="tool0"),),
    agents=(AgentPlan(tools=("tool0",)), AgentPlan(vendors=(1,), retries=1)),
    clients=(
        ClientPlan(user=1, steps=(StepPlan(act="pause", seconds=0.2),)),
        ClientPlan(at=0.731, user=1, agents=(1,), read_bytes=4096),
        ClientPlan(at=1.5, user=2, agents=(1,), steps=(StepPlan(act="state"), StepPlan(act="second_reader"))),
    ),
    events=(EventPlan(at=2.25, act="burst", number=2),),
    until=40.0,
)
"""A run of agent 1's ends with an error. The rest is there to go."""


def shrunk(plan: Plan, fails: Any) -> Plan:
    """The least plan; each that is tried can be acted."""

    def fails_and_can_be_acted(candidate: Plan) -> bool:
        assert_consistent(candidate)
        return bool(fails(candidate))

    return shrink(plan, fails_and_can_be_acted)


def assert_consistent(plan: Plan) -> None:
    names = {tool.name for tool in plan.tools}
    assert plan.shared or plan.workers == 1
    assert plan.vendors
    assert plan.agents
    for agent in plan.agents:
        assert agent.vendors
        assert set(agent.vendors) <= set(range(len(plan.vendors)))
        assert set(agent.tools) <= names
    for vendor in plan.vendors:
        assert vendor.answers
        assert all(set(answer.reply.tools) <= names for answer in vendor.answers)
    for client in plan.clients:
        assert client.agents
        assert set(client.agents) <= set(range(len(plan.agents)))
        assert client.worker < plan.workers


def test_a_bug_of_the_engine_shrinks_to_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def append_errors_twice(self: RunLog, event: Event, max_bytes: float = inf) -> LogEntry:
        if isinstance(event, Error):
            seq = self.last_seq + 1
            self._entries.append(LogEntry(seq, event, encode_frame(self.run_id, seq, event)))
        return append(self, event, max_bytes)

    append = RunLog.append
    monkeypatch.setattr(RunLog, "append", append_errors_twice)
    ways = failing(simulate(FAILING).violations)
    assert "one_end_and_last" in ways

    least = shrunk(FAILING, lambda plan: "one_end_and_last" in failing(simulate(plan).violations))
    assert least == Plan(seed=9, vendors=(VendorPlan(answers=(AnswerPlan(fault="refuse"),)),))

    pasted: dict[str, Any] = {}
    exec(paste_of(least), pasted)
    with pytest.raises(AssertionError):
        pasted["test_seed_9"]()
    monkeypatch.undo()
    pasted["test_seed_9"]()


def test_what_fails_always_becomes_the_plainest_world() -> None:
    for seed in range(15):
        assert shrunk(draw(seed), lambda _: True) == Plan(seed=seed)


def test_only_what_a_failure_needs_is_left() -> None:
    def fails(plan: Plan) -> bool:
        return any(
            plan.vendors[number].answers[0].reply.characters >= 500 and step.act == "leave" and plan.workers > 1
            for client in plan.clients
            for step in client.steps
            for agent in client.agents
            for number in plan.agents[agent].vendors
        )

    seeds = list(islice((seed for seed in count() if fails(draw(seed))), 3))
    for seed in seeds:
        least = shrunk(draw(seed), fails)
        (client,) = least.clients
        (vendor,) = least.vendors
        (answer,) = vendor.answers
        assert least.shared
        assert least.workers == 2
        assert client == ClientPlan(steps=(StepPlan(act="leave", after=client.steps[0].after),))
        assert 500 <= answer.reply.characters <= 1100
        assert least.agents == (AgentPlan(),)
        assert (least.tools, least.events) == ((), ())


def test_numbers_follow_what_is_dropped() -> None:
    agents = (AgentPlan(vendors=(0,)), AgentPlan(vendors=(2, 1)))
    plan = Plan(seed=1, vendors=(VendorPlan(),) * 2 + (VendorPlan(wire="gemini"),), agents=agents)
    plan = Plan(seed=1, vendors=plan.vendors, agents=agents, clients=(ClientPlan(agents=(1, 0)),))
    gemini = VendorPlan(wire="gemini")

    def fails(candidate: Plan) -> bool:
        agent = candidate.agents[candidate.clients[0].agents[0]]
        return candidate.vendors[agent.vendors[0]] == gemini

    assert shrunk(plan, fails) == Plan(seed=1, vendors=(gemini,))


def test_times_become_round() -> None:
    plan = Plan(seed=1, clients=(ClientPlan(at=3.217),), events=(EventPlan(at=7.891, act="kill"),))
    least = shrunk(plan, lambda one: one.clients[0].at > 3 and any(event.at > 7.5 for event in one.events))
    assert least == Plan(seed=1, clients=(ClientPlan(at=3.2),), events=(EventPlan(at=8.0, act="kill"),))


def test_faults_become_the_simplest_that_do() -> None:
    def least(fault: Any, fails: Any) -> Any:
        plan = Plan(seed=1, vendors=(VendorPlan(answers=(AnswerPlan(fault=fault),)),))
        return shrunk(plan, lambda one: fails(one.vendors[0].answers[0].fault)).vendors[0].answers[0].fault

    assert least("drip", lambda fault: fault is not None) == "refuse"
    assert least("reset", lambda fault: fault not in (None, "refuse", "status_500")) == "cut"
    assert least("drip", lambda fault: fault == "drip") == "drip"


def test_it_ends_after_so_many_worlds() -> None:
    tried: list[Plan] = []

    def fails(plan: Plan) -> bool:
        tried.append(plan)
        return False

    plan = draw(19)
    assert shrink(plan, fails, worlds=17) == plan
    assert len(tried) == 17
    assert len(set(tried)) == 17


def test_a_plain_plan_has_nothing_smaller() -> None:
    assert list(smaller(Plan(seed=5))) == []


def test_ways_to_fail_have_no_numbers() -> None:
    violations = [
        "one_end_and_last: run a has terminal events at [3] of 4",
        "one_end_and_last: run b has no terminal event",
        "client12 crashed: (ZeroDivisionError(),)",
        "3 clients hang",
        "the world broke down: StuckError: the world spins at 2.500000000",
    ]
    assert failing(violations) == {
        "one_end_and_last",
        "client crashed",
        " clients hang",
        "the world broke down: StuckError",
    }
    assert failing([]) == set()
