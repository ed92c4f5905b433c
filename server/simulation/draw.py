"""From a seed to a plan: which worlds there are, and how often. What is likely is in the tables, as weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from .plan import (
    AgentPlan,
    Alphabet,
    AnswerPlan,
    ClientAct,
    ClientManner,
    ClientPlan,
    DeadlinePlan,
    EventPlan,
    Plan,
    ReplyPlan,
    StepPlan,
    ToolManner,
    ToolPlan,
    UpstreamFault,
    VendorPlan,
    Wire,
    WorldAct,
)

T = TypeVar("T")


class Size(NamedTuple):
    """How much there is in a world, at most."""

    clients: int
    steps: int
    vendors: int
    answers: int
    agents: int
    tools: int
    events: int
    burst: int
    characters: int


SIZES: Mapping[Size, int] = {
    Size(clients=2, steps=2, vendors=1, answers=2, agents=1, tools=1, events=1, burst=3, characters=200): 55,
    Size(clients=3, steps=3, vendors=2, answers=3, agents=2, tools=2, events=2, burst=5, characters=600): 34,
    Size(clients=6, steps=4, vendors=3, answers=4, agents=3, tools=3, events=4, burst=8, characters=3_000): 10,
    Size(clients=12, steps=6, vendors=3, answers=6, agents=3, tools=4, events=8, burst=25, characters=30_000): 1,
}

WORKERS: Mapping[int, int] = {1: 70, 2: 24, 3: 6}
FAULT_RATES: Mapping[float, int] = {0.0: 30, 0.3: 30, 0.6: 25, 1.0: 15}
"""How many of a world's answers are bad."""

WIRES: Mapping[Wire, int] = {"openai": 4, "anthropic": 3, "gemini": 3}
ALPHABETS: Mapping[Alphabet, int] = {"ascii": 4, "cjk": 2, "emoji": 2, "markup": 2, "json": 2}
FAULTS: Mapping[UpstreamFault, int] = {
    "refuse": 2,
    "black_hole": 2,
    "no_headers": 2,
    "close_before_headers": 2,
    "close_in_headers": 2,
    "cut": 4,
    "reset": 4,
    "stall": 4,
    "stall_for_ever": 3,
    "pings_only": 3,
    "drip": 2,
    "no_end_mark": 2,
    "error_event": 3,
    "status_400": 1,
    "status_401": 1,
    "status_429": 3,
    "status_500": 2,
    "status_503": 2,
    "status_529": 1,
    "not_sse": 1,
    "bad_json": 2,
    "bad_utf8": 2,
    "endless_line": 1,
    "more_after_end": 2,
    "compressed": 1,
}
TOOL_MANNERS: Mapping[ToolManner, int] = {
    "returns": 6,
    "slow": 4,
    "hangs": 2,
    "raises": 2,
    "raises_group": 1,
    "raises_base": 1,
    "swallows_cancel": 2,
    "fails_in_cleanup": 1,
    "returns_much": 1,
    "returns_cycle": 1,
    "returns_nan": 1,
}
CLIENT_MANNERS: Mapping[ClientManner, int] = {"stream": 14, "whole": 3, "batch": 3, "socket": 3, "hostile": 1}
CLIENT_ACTS: Mapping[ClientAct, int] = {
    "leave": 3,
    "reset": 2,
    "half_close": 2,
    "pause": 2,
    "stop": 4,
    "stop_elsewhere": 2,
    "resume": 4,
    "resume_elsewhere": 3,
    "resume_from": 2,
    "resume_forged": 1,
    "second_reader": 3,
    "post_again": 2,
    "state": 2,
    "delete": 2,
}
WORLD_ACTS: Mapping[WorldAct, int] = {
    "kill": 4,
    "sigterm": 3,
    "sigterm_twice": 2,
    "store_away": 3,
    "shared_away": 3,
    "shared_forgets": 2,
    "burst": 3,
    "start": 0,
    "store_back": 0,
    "shared_back": 0,
}
"""What brings things back follows what took them away, see ``AFTERMATHS``; alone it would do nothing."""

AFTERMATHS: Mapping[WorldAct, WorldAct] = {
    "kill": "start",
    "sigterm": "start",
    "sigterm_twice": "start",
    "store_away": "store_back",
    "shared_away": "shared_back",
}
NEEDS_SHARING: frozenset[WorldAct] = frozenset({"shared_away", "shared_forgets"})

DEADLINES: Mapping[DeadlinePlan, int] = {
    DeadlinePlan(): 4,
    DeadlinePlan(total=20.0, connect=3.0, first_token=4.0, idle=3.0, tool=2.0): 4,
    DeadlinePlan(total=6.0, connect=1.0, first_token=2.0, idle=1.5, tool=1.0): 2,
    DeadlinePlan(total=2.5, connect=2.0, first_token=2.0, idle=2.0, tool=2.0): 1,
}
SECONDS: Mapping[float, int] = {0.0: 1, 0.001: 1, 0.1: 2, 0.5: 4, 1.0: 4, 2.0: 3, 5.0: 2, 12.0: 1}
"""How long what takes time takes, before it is jittered."""

READ_BYTES: Mapping[int, int] = {65_536: 12, 4096: 2, 100: 1}
READ_PAUSES: Mapping[float, int] = {0.0: 12, 0.05: 2, 1.0: 1}
WINDOWS: Mapping[int, int] = {65_536: 12, 4096: 2, 500: 1}
RECORDINGS: Mapping[str, int] = {
    "": 300,
    "gpt4o-short": 6,
    "ollama-llama3": 3,
    "demo-tools": 3,
    "gpt4o-demo": 2,
    "gpt4o-13s": 1,
    "demo-93s": 1,
}
GRACES: Mapping[float, int] = {0.0: 1, 1.0: 2, 5.0: 3, 30.0: 1}
RETENTIONS: Mapping[float, int] = {3.0: 2, 20.0: 3, 60.0: 2}
LEASES: Mapping[float, int] = {2.0: 1, 10.0: 4, 30.0: 2}
DRAINS: Mapping[float, int] = {0.0: 1, 2.0: 2, 30.0: 3}
LATENCIES: Mapping[float, int] = {0.0: 4, 0.001: 2, 0.05: 2, 0.5: 1}
MAX_RUNS: Mapping[int, int] = {1: 1, 2: 1, 8: 6}
QUEUES: Mapping[int, int] = {0: 1, 2: 1, 4: 4}

QUIET_SECONDS = 30.0
LONG_QUIET_SECONDS = 600.0
"""From the last thing that is planned to the end at least; the world itself waits for those who still act.

A worker that is alone has next to nothing to do meanwhile: hours would cost nothing. Those that share speak all the
time.
"""


class _Draw:
    """Draws from tables; the same seed draws the same."""

    def __init__(self, seed: int) -> None:
        self._random = Random(f"world {seed}")
        self.size = self.one_of(SIZES)
        self.fault_rate = self.one_of(FAULT_RATES)

    def one_of(self, table: Mapping[T, int]) -> T:
        return self._random.choices(list(table), list(table.values()))[0]

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def whole(self, least: int, most: int) -> int:
        return self._random.randint(least, max(least, most))

    def many(self, least: int, most: int, make: Callable[[], T]) -> tuple[T, ...]:
        return tuple(make() for _ in range(self.whole(least, most)))

    def some_of(self, names: Sequence[T], most: int) -> tuple[T, ...]:
        return tuple(self._random.sample(list(names), self.whole(0, min(most, len(names)))))

    def seconds(self) -> float:
        return self.spread(self.one_of(SECONDS))

    def spread(self, figure: float) -> float:
        """About so much; to a millisecond half of the time, so that things also happen at the same moment."""
        return figure if self.chance(0.5) else round(figure * self._random.uniform(0.5, 1.5), 3)

    def moment(self, most: float) -> float:
        return round(self._random.uniform(0.0, most), 3)

    def characters(self) -> int:
        """Mostly few, seldom as many as the world's size allows, sometimes none."""
        return 0 if self.chance(0.03) else round(float(self.size.characters) ** self._random.random())


def draw(seed: int) -> Plan:
    """The world of that seed."""
    d = _Draw(seed)
    workers = d.one_of(WORKERS)
    shared = workers > 1 or d.chance(0.1)
    keyed = d.chance(0.25)
    tools = tuple(_tool(d, number) for number in range(d.whole(0, d.size.tools)))
    vendors = d.many(1, d.size.vendors, lambda: _vendor(d, [tool.name for tool in tools]))
    agents = d.many(1, d.size.agents, lambda: _agent(d, len(vendors), tools))
    clients = d.many(1, d.size.clients, lambda: _client(d, workers, len(agents), keyed))
    events = _events(d, workers, shared)
    last = max([client.at for client in clients] + [event.at for event in events])
    return Plan(
        seed=seed,
        workers=workers,
        shared=shared,
        keyed=keyed,
        resume_grace=d.one_of(GRACES),
        retention=d.one_of(RETENTIONS),
        drain=d.one_of(DRAINS),
        max_runs=d.one_of(MAX_RUNS),
        queue=d.one_of(QUEUES),
        queue_seconds=d.spread(2.0),
        lease=d.spread(d.one_of(LEASES)),
        latency=d.one_of(LATENCIES),
        vendors=vendors,
        tools=tools,
        agents=agents,
        clients=clients,
        events=events,
        until=round(last + (QUIET_SECONDS if shared else LONG_QUIET_SECONDS)),
    )


def _tool(d: _Draw, number: int) -> ToolPlan:
    return ToolPlan(name=f"tool{number}", manner=d.one_of(TOOL_MANNERS), seconds=d.seconds())


def _vendor(d: _Draw, tools: Sequence[str]) -> VendorPlan:
    count = d.whole(1, d.size.answers)
    answers = [_answer(d, tools, is_last=place == count - 1) for place in range(count)]
    return VendorPlan(wire=d.one_of(WIRES), answers=tuple(answers))


def _answer(d: _Draw, tools: Sequence[str], is_last: bool) -> AnswerPlan:
    called = d.some_of(tools, 2) if d.chance(0.15 if is_last else 0.8) else ()
    reply = ReplyPlan(
        recording=d.one_of(RECORDINGS),
        characters=d.characters(),
        pieces=d.whole(1, d.one_of({5: 2, 20: 5, 60: 2})),
        alphabet=d.one_of(ALPHABETS),
        first_after=d.seconds(),
        seconds=d.seconds(),
        pieces_per_read=d.one_of({1: 5, 2: 1, 5: 1, 1000: 1}),
        reasoning=d.chance(0.2),
        tools=called,
        splits=d.whole(1, 1000) if d.chance(0.3) else 0,
    )
    fault: UpstreamFault = d.one_of(FAULTS)
    where = d.one_of({0.0: 1, 1.0: 1, 0.5: 2}) if d.chance(0.3) else d.moment(1.0)
    return AnswerPlan(
        reply=reply, fault=fault if d.chance(d.fault_rate) else None, where=where, seconds=max(0.01, d.seconds())
    )


def _agent(d: _Draw, vendors: int, tools: Sequence[ToolPlan]) -> AgentPlan:
    first = d.whole(0, vendors - 1)
    chain = (first, *(number for number in range(vendors) if number != first and d.chance(0.5)))
    return AgentPlan(
        vendors=chain,
        retries=d.one_of({0: 2, 1: 2, 2: 2}),
        tools=tuple(tool.name for tool in tools),
        memory=d.chance(0.4),
        max_steps=d.one_of({1: 1, 2: 2, 4: 3}),
        deadlines=d.one_of(DEADLINES),
    )


def _client(d: _Draw, workers: int, agents: int, keyed: bool) -> ClientPlan:
    manner = d.one_of(CLIENT_MANNERS)
    asked = d.whole(1, 3) if manner in ("batch", "socket") else 1
    return ClientPlan(
        at=d.moment(d.one_of({0.0: 2, 1.0: 3, 20.0: 2})),
        manner=manner,
        worker=d.whole(0, workers - 1),
        agents=tuple(d.whole(0, agents - 1) for _ in range(asked)),
        user=d.one_of({0: 1, 1: 12, 2: 4}) if keyed else 0,
        session=d.one_of({0: 3, 1: 1, 2: 1}),
        on_disconnect=d.one_of({"grace": 3, "cancel": 1, "continue": 1}),
        idempotent=d.chance(0.3),
        read_bytes=d.one_of(READ_BYTES),
        read_pause=d.one_of(READ_PAUSES),
        window=d.one_of(WINDOWS),
        steps=d.many(0, d.size.steps, lambda: _step(d)),
    )


def _step(d: _Draw) -> StepPlan:
    return StepPlan(
        act=d.one_of(CLIENT_ACTS),
        events=d.one_of({1_000_000: 3, 1: 1, 3: 2, 10: 2}),
        after=d.seconds(),
        seconds=d.seconds(),
        number=d.whole(0, 12),
    )


def _events(d: _Draw, workers: int, shared: bool) -> tuple[EventPlan, ...]:
    events: list[EventPlan] = []
    for _ in range(d.whole(0, d.size.events) if d.chance(0.6) else 0):
        act = d.one_of(WORLD_ACTS)
        if act in NEEDS_SHARING and not shared:
            continue
        at = d.moment(d.one_of({3.0: 3, 20.0: 1}))
        number = d.whole(1, d.size.burst) if act == "burst" else d.whole(0, workers - 1)
        events.append(EventPlan(at=at, act=act, number=number))
        if act in AFTERMATHS and d.chance(0.8):
            back = EventPlan(at=round(at + d.seconds(), 3), act=AFTERMATHS[act], number=number)
            events.append(back)
    return tuple(sorted(events, key=lambda event: event.at))
