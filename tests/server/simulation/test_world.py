"""Simulated worlds: the real server in them, how its workers die, drain and come back, and what the world tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from sqlalchemy import text

from engine import AgentStopped, Error, GenerationComplete, TextDelta
from server.simulation.determinism import Chance, run
from server.simulation.observations import Observations, Response
from server.simulation.plan import (
    AgentPlan,
    AnswerPlan,
    ClientPlan,
    DeadlinePlan,
    EventPlan,
    Plan,
    ReplyPlan,
    ToolPlan,
    VendorPlan,
    WorldAct,
)
from server.simulation.run_plan import Outcome, simulate
from server.simulation.world import UPSTREAM_KEY, Cast, World
from server.store.errors import StoreUnavailableError
from tests.server.simulation.stand_ins import READERS, act_reader

SLOW = VendorPlan(answers=(AnswerPlan(reply=ReplyPlan(characters=100, pieces=11, first_after=0.0, seconds=10.0)),))
"""Says something each second."""


def outcome(cast: Cast = READERS, **fields: object) -> Outcome:
    """What becomes of a world in which nothing goes wrong by itself."""
    return simulate(Plan(**{"seed": 1, "until": 30.0, **fields}), cast)  # type: ignore[arg-type]


def only_run(seen: Observations) -> list[object]:
    """The one run's events."""
    (one,) = seen.runs.values()
    return [entry.event for entry in one.events]


def answers_of(result: Outcome) -> list[bytes]:
    """The first line of each client's answer, by the clients' numbers."""
    responses = sorted(result.observations.responses, key=lambda response: response.client)
    return [response.body[:12] for response in responses]


def test_a_plan_is_acted_by_the_real_server() -> None:
    result = outcome()
    assert result.violations == []
    end = only_run(result.observations)[-1]
    assert isinstance(end, GenerationComplete)
    (kept,) = result.observations.kept.values()
    assert (kept.status, kept.response) == ("done", end.response)
    (response,) = result.observations.responses
    assert b"HTTP/1.1 200" in response.body
    assert end.response.encode()[:20] in response.body
    assert response.ended_at == 2.5
    assert result.virtual_seconds > 30


def test_workers_send_the_key_and_nobody_else_does() -> None:
    seen = outcome().observations
    assert UPSTREAM_KEY.encode() in seen.calls[0].request
    assert UPSTREAM_KEY in seen.secrets
    assert UPSTREAM_KEY not in seen.output
    assert "run.ended" in seen.output


def test_users_need_keys_where_there_are_some() -> None:
    result = outcome(keyed=True, clients=(ClientPlan(user=0), ClientPlan(user=1), ClientPlan(user=2)))
    assert answers_of(result) == [b"HTTP/1.1 401", b"HTTP/1.1 200", b"HTTP/1.1 200"]


def test_a_killed_worker_says_and_keeps_nothing_more() -> None:
    result = outcome(vendors=(SLOW,), events=(EventPlan(at=2.5, act="kill"),))
    seen = result.observations
    assert seen.deaths == [(2.5, 0)]
    assert seen.responses[0].ending == "broken"
    assert seen.responses[0].ended_at == 2.5
    assert max(entry.at for one in seen.runs.values() for entry in one.events) <= 2.5
    assert isinstance(only_run(seen)[-1], TextDelta)
    (kept,) = seen.kept.values()
    assert kept.status == "running"
    assert seen.calls[0].closed_at == 2.5


def test_a_worker_that_is_alone_ends_the_runs_of_its_life_before() -> None:
    events = (EventPlan(at=2.5, act="kill"), EventPlan(at=4.0, act="start"))
    clients = (ClientPlan(), ClientPlan(at=3.0), ClientPlan(at=5.0))
    seen = outcome(vendors=(SLOW,), clients=clients, events=events).observations
    assert [response.ending for response in seen.responses] == ["broken", "broken", "left"]
    assert sorted(kept.status for kept in seen.kept.values()) == ["done", "error"]
    assert [one.life for one in seen.runs.values()] == [0, 1]


def test_other_workers_end_the_runs_of_a_dead_one() -> None:
    seen = outcome(
        workers=2, shared=True, lease=3.0, vendors=(SLOW,), events=(EventPlan(at=2.5, act="kill"),)
    ).observations
    (kept,) = seen.kept.values()
    assert kept.status == "error"
    assert b"worker_lost" in kept.events[-1][1]


def test_start_does_nothing_for_a_worker_that_is_there() -> None:
    result = outcome(events=(EventPlan(at=1.0, act="start"),))
    assert result.violations == []
    assert result.trace.count(" started\n") == 1


def test_sigterm_lets_runs_finish_for_so_long() -> None:
    result = outcome(drain=4.0, vendors=(SLOW,), events=(EventPlan(at=2.5, act="sigterm"),))
    seen = result.observations
    assert seen.drains == [(2.5, 0)]
    end = only_run(seen)[-1]
    assert isinstance(end, Error)
    assert end.code == "draining"
    assert seen.responses[0].ended_at == 6.5
    assert "worker0.0 ended" in result.trace
    assert seen.deaths == []


def test_a_second_sigterm_ends_runs_at_once() -> None:
    seen = outcome(drain=4.0, vendors=(SLOW,), events=(EventPlan(at=2.5, act="sigterm_twice"),)).observations
    assert seen.responses[0].ended_at == 2.5
    assert seen.drains == [(2.5, 0)]


@pytest.mark.parametrize(("act", "left_at"), [("sigterm", "7.000000000"), ("sigterm_twice", "3.000000000")])
def test_a_process_leaves_a_tool_that_cannot_be_cancelled(act: WorldAct, left_at: str) -> None:
    calling = VendorPlan(answers=(AnswerPlan(reply=ReplyPlan(tools=("stubborn",), seconds=0.0)),))
    tool = ToolPlan(name="stubborn", manner="swallows_cancel", seconds=20.0)
    agent = AgentPlan(tools=("stubborn",), deadlines=DeadlinePlan(tool=60.0))
    events = (EventPlan(at=2.0, act=act),)
    result = outcome(drain=0.0, vendors=(calling,), tools=(tool,), agents=(agent,), events=events)
    assert f"{left_at} worker0.0 left\n" in result.trace


def test_only_the_first_sigterm_counts() -> None:
    events = (EventPlan(at=2.5, act="sigterm"), EventPlan(at=3.5, act="sigterm"))
    seen = outcome(vendors=(SLOW,), events=events).observations
    assert seen.drains == [(2.5, 0)]
    assert seen.responses[0].ended_at == 3.5


def test_who_comes_back_leaves_the_runs_of_others_alone() -> None:
    events = (EventPlan(at=1.0, act="kill", number=1), EventPlan(at=2.0, act="start", number=1))
    result = outcome(workers=2, shared=True, vendors=(SLOW,), events=events)
    assert result.violations == []
    assert [kept.status for kept in result.observations.kept.values()] == ["done"]


def test_what_is_away_comes_back_before_the_end() -> None:
    result = outcome(events=(EventPlan(at=1.5, act="store_away"),))
    assert [kept.status for kept in result.observations.kept.values()] == ["done"]
    assert result.observations.left_over == []


def test_without_its_store_a_worker_takes_no_run_but_goes_on() -> None:
    events = (EventPlan(at=1.5, act="store_away"), EventPlan(at=6.0, act="store_back"))
    clients = (ClientPlan(), ClientPlan(at=3.0), ClientPlan(at=7.0))
    result = outcome(clients=clients, events=events)
    assert answers_of(result) == [b"HTTP/1.1 200", b"HTTP/1.1 503", b"HTTP/1.1 200"]
    assert [kept.status for kept in result.observations.kept.values()] == ["done", "done"]


def test_a_worker_that_finds_no_store_starts_once_there_is_one() -> None:
    events = (
        EventPlan(at=0.0, act="kill"),
        EventPlan(at=1.0, act="store_away"),
        EventPlan(at=1.0, act="start"),
        EventPlan(at=3.5, act="store_back"),
    )
    result = outcome(clients=(ClientPlan(at=8.0),), events=events)
    assert result.violations == []
    assert "4.000000000 worker0.1 started\n" in result.trace


def test_a_shared_log_that_goes_and_comes_back_has_everything() -> None:
    events = (EventPlan(at=1.0, act="shared_away"), EventPlan(at=4.0, act="shared_back"))
    result = outcome(workers=2, shared=True, vendors=(SLOW,), events=events)
    assert result.violations == []
    assert isinstance(only_run(result.observations)[-1], GenerationComplete)


def test_a_burst_is_more_clients() -> None:
    result = outcome(events=(EventPlan(at=1.0, act="burst", number=12),), max_runs=4, queue=2, queue_seconds=3.0)
    assert len(result.observations.responses) == 13
    assert {response.client for response in result.observations.responses} == set(range(13))
    assert answers_of(result).count(b"HTTP/1.1 503") == 7


async def _act_badly(world: World, number: int, plan: ClientPlan) -> None:
    await trio.sleep(1)
    if number:
        await trio.sleep_forever()
    raise ZeroDivisionError(plan.worker)


def test_clients_that_crash_or_hang_are_violations() -> None:
    result = outcome(replace(READERS, act_client=_act_badly), clients=(ClientPlan(), ClientPlan()))
    assert result.violations == ["client0 crashed: (ZeroDivisionError(0),)", "1 clients hang"]


async def _act_stuck(world: World, number: int, plan: ClientPlan) -> None:
    await act_reader(world, number, plan)
    while True:  # noqa: ASYNC110 - that is the matter
        await trio.lowlevel.checkpoint()


def test_a_world_that_spins_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.simulation.determinism.MAX_STEPS_WITHOUT_TIME", 3000)
    result = outcome(replace(READERS, act_client=_act_stuck))
    assert result.violations == ["the world broke down: StuckError: the world spins at 2.500000000"]
    assert "event" in result.trace


def test_a_plan_that_cannot_be_built_is_a_violation() -> None:
    result = outcome(agents=(AgentPlan(vendors=(7,)),))
    assert "the world broke down: IndexError" in result.violations[0]


async def _act_and_stay(world: World, number: int, plan: ClientPlan) -> None:
    await act_reader(world, number, plan)
    stream = await world.network.connect(*world.address(plan.worker))
    assert world.lives[0][0].composition is not None
    await world.lives[0][0].composition.admission.enter(None)
    world.observations.responses.append(Response(number, "state", 0, 0.0, ending="left"))
    assert stream.closed_at is None


def test_what_is_left_over_is_told() -> None:
    result = outcome(replace(READERS, act_client=_act_and_stay))
    assert "worker0.0: 1 places taken" in result.observations.left_over
    assert any("places taken" in violation for violation in result.violations)


def test_the_dead_reach_nothing() -> None:
    async def die(_: Chance) -> None:
        world = World(Plan(seed=1, shared=True), READERS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.run)
            await trio.sleep(1)
            life = world.lives[0][0]
            services = life.services
            assert services is not None
            assert services.database is not None
            await services.database.read(lambda c: c.execute(text("SELECT 1")).scalar_one())
            assert world.redis is not None
            assert world.redis.connections == 2
            life.kill()
            assert world.redis.connections == 0
            assert world.network.open_connections(life.name) == []
            await world.network.listen(*world.address(0)).aclose()  # the address is free
            with pytest.raises(StoreUnavailableError, match="dead"):
                await services.database.write(lambda c: c.execute(text("DELETE FROM runs")))
            with pytest.raises(ConnectionRefusedError):
                await life._connect("vendor0", 80, False)
            with pytest.raises(ConnectionRefusedError):
                await world.network.connect(*world.address(0))
            nursery.cancel_scope.cancel()

    run(die, 1)


def test_worlds_do_not_see_each_other() -> None:
    first = outcome(clients=(ClientPlan(), ClientPlan()), keyed=False)
    second = outcome()
    assert len(first.observations.kept) == 2
    assert len(second.observations.kept) == 1


def test_bounds_are_measured() -> None:
    bounds = outcome().observations.bounds
    assert bounds["active_runs"] == bounds["places"] == 1
    assert 0 < bounds["tasks"] < 100
    assert 0 < bounds["log_bytes"] < 10_000
    assert bounds["connections"] == 2


def test_a_stop_is_no_business_of_the_plain_reader() -> None:
    """The stand-in itself: it reads to the end whatever that is."""
    seen = outcome(vendors=(SLOW,), agents=(AgentPlan(deadlines=DeadlinePlan(idle=0.5)),)).observations
    end = only_run(seen)[-1]
    assert isinstance(end, Error)
    assert not isinstance(end, AgentStopped)
    assert seen.responses[0].ended_at == 0.5
