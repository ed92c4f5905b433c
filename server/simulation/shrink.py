"""Makes the plan of a world that fails smaller, as long as it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar, cast

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import replace

from .plan import AgentPlan, ClientPlan, Plan, UpstreamFault

T = TypeVar("T")

MAX_WORLDS = 2_000
"""How many smaller plans are tried; some hundred are usual."""

SIMPLE_FAULTS: tuple[UpstreamFault, ...] = ("refuse", "status_500", "cut", "reset", "stall_for_ever")
"""What other faults may become, the simplest first."""

_NEVER_EMPTY = frozenset({"vendors", "answers", "agents", "clients"})


def failing(violations: list[str]) -> set[str]:
    """In which ways: the names of invariants, or what broke down, without numbers."""
    return {re.sub(r"\d+(\.\d+)?", "", ": ".join(line.split(": ")[: 2 if _broke(line) else 1])) for line in violations}


def shrink(plan: Plan, fails: Callable[[Plan], bool], worlds: int = MAX_WORLDS) -> Plan:
    """The smallest plan that still fails, as far as single steps lead there, and so many worlds."""
    tried = {plan}
    place = 0

    def still_fails(candidate: Plan) -> bool:
        if candidate in tried or len(tried) > worlds:
            return False
        tried.add(candidate)
        return fails(candidate)

    while found := next((one for one in _numbered(plan, place) if still_fails(one[1])), None):
        place, plan = found
    return plan


def _numbered(plan: Plan, first: int) -> Iterator[tuple[int, Plan]]:
    """What is smaller from that place on, then what is before it: what did not help just now comes last."""
    yield from islice(enumerate(smaller(plan)), first, None)
    yield from islice(enumerate(smaller(plan)), first)


def smaller(plan: Plan) -> Iterator[Plan]:
    """Plans that are smaller by a step, the large steps first; each can be acted."""
    for number in range(len(plan.vendors)):
        yield from _without_vendor(plan, number)
    for number in range(len(plan.agents)):
        yield from _without_agent(plan, number)
    for candidate in _smaller_struct(plan):
        valid = _valid(candidate)
        if valid != plan:
            yield valid


def _smaller_struct(value: T) -> Iterator[T]:
    """Its fields at their defaults, then each of them smaller."""
    struct = cast(Struct, value)
    fields = [(field.name, getattr(struct, field.name), field.default) for field in msgspec.structs.fields(struct)]
    fields = [(name, current, default) for name, current, default in fields if current != default and name != "seed"]
    for name, _, default in fields:
        if default is not NODEFAULT:
            yield cast(T, replace(struct, **{name: default}))
    for name, current, default in fields:
        for reduced in _smaller_value(name, current, default):
            yield cast(T, replace(struct, **{name: reduced}))


def _smaller_value(name: str, value: Any, default: Any) -> Iterator[Any]:
    match value:
        case Struct():
            yield from _smaller_struct(value)
        case tuple():
            yield from _smaller_tuple(name, value)
        case bool():
            pass  # there is nothing beside its default
        case int():
            start = default if isinstance(default, int) else 0
            yield from sorted({start, (start + value) // 2} - {value})
        case float():
            yield from (rounded for digits in (0, 1, 2) if (rounded := round(value, digits)) != value)
        case str() if name == "fault" and value in SIMPLE_FAULTS:
            yield from SIMPLE_FAULTS[: SIMPLE_FAULTS.index(value)]
        case str() if name == "fault":
            yield from SIMPLE_FAULTS
        case _:
            pass


def _smaller_tuple(name: str, items: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Without the half of its items, a quarter, one; then with one that is smaller."""
    size = len(items)
    while size:
        for start in range(0, len(items), size):
            rest = items[:start] + items[start + size :]
            if rest or name not in _NEVER_EMPTY:
                yield rest
        size //= 2
    for place, item in enumerate(items):
        for reduced in _smaller_value("", item, NODEFAULT):
            yield (*items[:place], reduced, *items[place + 1 :])


def _without_vendor(plan: Plan, number: int) -> Iterator[Plan]:
    if len(plan.vendors) > 1:
        agents = tuple(replace(agent, vendors=_without(agent.vendors, number)) for agent in plan.agents)
        yield replace(plan, vendors=_dropped(plan.vendors, number), agents=agents)


def _without_agent(plan: Plan, number: int) -> Iterator[Plan]:
    if len(plan.agents) > 1:
        clients = tuple(replace(client, agents=_without(client.agents, number)) for client in plan.clients)
        yield replace(plan, agents=_dropped(plan.agents, number), clients=clients)


def _dropped(items: tuple[T, ...], number: int) -> tuple[T, ...]:
    return items[:number] + items[number + 1 :]


def _without(numbers: tuple[int, ...], gone: int) -> tuple[int, ...]:
    """The numbers as they are once that one is no more."""
    return tuple(number - (number > gone) for number in numbers if number != gone) or (0,)


def _valid(plan: Plan) -> Plan:
    """With what it names being there: workers share a log, and vendors, agents and tools have no higher numbers."""
    workers = max(1, plan.workers if plan.shared else 1)
    tools = {tool.name for tool in plan.tools}
    return replace(
        plan,
        workers=workers,
        vendors=tuple(_valid_tools(vendor, tools) for vendor in plan.vendors),
        agents=tuple(_valid_agent(agent, len(plan.vendors), tools) for agent in plan.agents),
        clients=tuple(_valid_client(client, workers, len(plan.agents)) for client in plan.clients),
    )


def _valid_tools(value: Any, tools: set[str]) -> Any:
    """The vendor, its models calling no other tools than those."""
    answers = (
        replace(answer, reply=replace(answer.reply, tools=_known(answer.reply.tools, tools)))
        for answer in value.answers
    )
    return replace(value, answers=tuple(answers))


def _valid_agent(agent: AgentPlan, vendors: int, tools: set[str]) -> AgentPlan:
    numbers = tuple(number for number in agent.vendors if number < vendors)
    return replace(agent, vendors=numbers or (0,), tools=_known(agent.tools, tools))


def _valid_client(client: ClientPlan, workers: int, agents: int) -> ClientPlan:
    numbers = tuple(number for number in client.agents if number < agents)
    return replace(client, agents=numbers or (0,), worker=min(client.worker, workers - 1))


def _known(names: tuple[str, ...], tools: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in tools)


def _broke(line: str) -> bool:
    return line.startswith("the world broke down")
