"""Drawn worlds: the same for the same seed, of every kind, and mostly small."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from server.simulation import plan as plans
from server.simulation.draw import AFTERMATHS, draw
from server.simulation.plan import Plan

SEEDS = range(1000)


@cache
def drawn() -> list[Plan]:
    return [draw(seed) for seed in SEEDS]


def parts_of(thing: Any) -> Iterator[msgspec.Struct]:
    """The structs in it, itself included."""
    if isinstance(thing, tuple):
        for part in thing:
            yield from parts_of(part)
    elif isinstance(thing, msgspec.Struct):
        yield thing
        for name in thing.__struct_fields__:
            yield from parts_of(getattr(thing, name))


def choices_in(hint: Any) -> set[str]:
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(choices_in, get_args(hint)))
    return set()


def choices() -> list[tuple[type[msgspec.Struct], str, str]]:
    """Each field of a plan that has closed choices, with each of these."""
    structs = [kind for kind in vars(plans).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    fields = [(kind, name, hint) for kind in structs for name, hint in get_type_hints(kind).items()]
    return [(kind, name, choice) for kind, name, hint in fields for choice in sorted(choices_in(hint))]


@cache
def seen() -> set[tuple[type, str, Any]]:
    parts = [part for plan in drawn() for part in parts_of(plan)]
    return {(type(part), name, getattr(part, name)) for part in parts for name in part.__struct_fields__}


@pytest.mark.parametrize(("kind", "field", "choice"), choices(), ids=lambda part: getattr(part, "__name__", part))
def test_every_choice_is_drawn(kind: type[msgspec.Struct], field: str, choice: str) -> None:
    assert (kind, field, choice) in seen()


def test_the_choices_are_found() -> None:
    """The test above is of no use without them."""
    assert len(choices()) > 60


def test_a_seed_is_a_plan() -> None:
    assert [draw(seed) for seed in SEEDS[:50]] == drawn()[:50]
    assert [plan.seed for plan in drawn()] == list(SEEDS)


def test_seeds_differ() -> None:
    assert len({msgspec.json.encode(msgspec.structs.replace(plan, seed=0)) for plan in drawn()}) == len(SEEDS)


def test_a_plan_survives_json() -> None:
    for plan in drawn()[:100]:
        assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_several_workers_share() -> None:
    assert all(plan.shared for plan in drawn() if plan.workers > 1)
    assert any(plan.shared for plan in drawn() if plan.workers == 1)


def test_numbers_are_of_what_there_is() -> None:
    for plan in drawn():
        assert all(number < len(plan.vendors) for agent in plan.agents for number in agent.vendors)
        assert all(number < len(plan.agents) for client in plan.clients for number in client.agents)
        assert all(client.worker < plan.workers for client in plan.clients)
        assert all(client.user == 0 or plan.keyed for client in plan.clients)
        names = {tool.name for tool in plan.tools}
        called = {name for vendor in plan.vendors for answer in vendor.answers for name in answer.reply.tools}
        assert called <= names


def test_most_worlds_are_small_and_some_large() -> None:
    clients = sorted(len(plan.clients) for plan in drawn())
    assert clients[len(clients) // 2] <= 2
    assert clients[-1] >= 8


def test_what_goes_away_mostly_comes_back() -> None:
    events = [event.act for plan in drawn() for event in plan.events]
    for act, aftermath in AFTERMATHS.items():
        assert act in events
        assert aftermath in events
    assert events.count("store_away") > events.count("store_back") > events.count("store_away") / 2


def test_worlds_outlast_their_plan() -> None:
    for plan in drawn():
        assert all(client.at < plan.until for client in plan.clients)
        assert all(event.at < plan.until for event in plan.events)
