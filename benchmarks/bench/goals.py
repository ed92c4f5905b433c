"""What issue 7 wants of us, as data, and whether a result shows it; beside one goal what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from benchmarks.bench.result import Result, Summary
from benchmarks.bench.summary import FLOOR, OURS, STEPPED

State: TypeAlias = Literal["reached", "not reached", "not measured"]
Kind: TypeAlias = Literal["ratio", "difference", "figure"]

PEERS = ("litellm", "pydantic-ai", "openai-agents", "fastapi-openai", "fastapi-httpx", "fastapi-aiohttp")
"""In the order of the issue's table."""


FEWEST_ROUNDS = 3
"""For a claim: the interval of a single round is a point."""


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of ours against one limit.

    Attributes:
        title: for people.
        workload, metric: which figure; ``n``, of which step; None: of the largest that was measured.
        against: the arm that it is compared with; "" for none.
        kind: ours divided by theirs, ours less theirs, or ours alone.
        limit: ours is to be this at most; with ``at_least``, at least.
        unit: of the limit; "" of ratios.
    """

    title: str
    workload: str
    metric: str
    limit: float
    against: str = ""
    kind: Kind = "figure"
    at_least: bool = False
    n: int | None = None
    unit: str = ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; ``interval`` where it is a ratio."""

    goal: Goal
    state: State
    value: float | None = None
    interval: tuple[float, float] | None = None


def _against_peers(title: str, workload: str, metric: str, limits: Sequence[float], n: int | None = None) -> list[Goal]:
    return [
        Goal(title=title, workload=workload, metric=metric, limit=limit, against=peer, kind="ratio", n=n)
        for peer, limit in zip(PEERS, limits, strict=True)
    ]


_PACED_LIMITS = (1 / 5, 1 / 4, 1 / 2.4, 1 / 2.4, 1 / 1.4, 1.3)
_PACED_TITLE = "CPU per event, paced 200 streams of 20/s"
_RECORDED_TITLE = "CPU per event, recorded GPT-4o"
_EVENT = "cpu_us_per_event"
_STREAMS_TITLE = "streams per core, recorded GPT-4o"
_STREAMS = ("litellm", 8.0), ("fastapi-openai", 2.5), (FLOOR, 0.5)
_CANCEL_TITLES = {
    "w6-stream": "disconnect → upstream closed p99, while streaming",
    "w6-silent": "disconnect → upstream closed p99, before the answer",
    "w6-stalled": "disconnect → upstream closed p99, unread",
}

GOALS = (
    *_against_peers("CPU per event, flood", "w5", _EVENT, (1 / 25, 1 / 14, 1 / 6, 1 / 6, 1 / 1.6, 1.2)),
    *_against_peers(_PACED_TITLE, "w2", _EVENT, _PACED_LIMITS, 200),
    Goal(title=_PACED_TITLE, workload="w2", metric=_EVENT, limit=1.8, against=FLOOR, kind="ratio", n=200),
    *_against_peers(_RECORDED_TITLE, "w3", _EVENT, _PACED_LIMITS, 20),
    Goal(title=_RECORDED_TITLE, workload="w3", metric=_EVENT, limit=1.8, against=FLOOR, kind="ratio", n=20),
    *_against_peers(
        "added time to the first event p50, one at a time",
        "w1",
        "ttfe_added_ms.p50",
        (1 / 10, 1 / 4, 1 / 3, 1 / 2, 1 / 1.1, 1.8),
    ),
    *(
        Goal(
            title=_STREAMS_TITLE,
            workload="w3",
            metric="streams_per_core",
            limit=limit,
            against=arm,
            kind="ratio",
            at_least=True,
            n=STEPPED,
        )
        for arm, limit in _STREAMS
    ),
    Goal(title="memory per open stream", workload="w10", metric="mem_kib_per_stream", limit=32, unit="KiB"),
    Goal(
        title="memory per open stream",
        workload="w10",
        metric="mem_kib_per_stream",
        limit=0.5,
        against="fastapi-openai",
        kind="ratio",
    ),
    *(
        Goal(title=title, workload=name, metric="cancel_ms.p99", limit=5, against=FLOOR, kind="difference", unit="ms")
        for name, title in _CANCEL_TITLES.items()
    ),
    *(
        Goal(title=f"leaked upstreams, {name}", workload=name, metric="leaked_upstreams", limit=0, unit="leaks")
        for name in _CANCEL_TITLES
    ),
    Goal(title="start to the first 200", workload="w8", metric="start_ms", limit=0.1, against="litellm", kind="ratio"),
    Goal(title="import engine over a bare interpreter", workload="w8", metric="import_ms", limit=100, unit="ms"),
    # Not the issue's: an import of the package alone loads next to nothing.
    Goal(
        title="import of what an agent needs, provider left out, over a bare interpreter",
        workload="w8",
        metric="import_used_ms",
        limit=100,
        unit="ms",
    ),
    Goal(title="replay error p99, 100 streams", workload="w9", metric="replay_error_us.p99", limit=2000, unit="µs"),
    Goal(title="replay drift at the last event", workload="w9", metric="replay_drift_us", limit=500, unit="µs"),
    Goal(title="cost of an event as runs grow to 10,000", workload="flat-events", metric="growth", limit=1.15),
    Goal(title="cost of an event, 1 → 1,000 streams", workload="flat-streams", metric="growth", limit=1.15, n=STEPPED),
)


def judge(goal: Goal, result: Result) -> Verdict:
    """A ratio below or above 1 is claimed only where its interval leaves 1 out."""
    ours = find(result, goal, OURS)
    if ours is None:
        return Verdict(goal=goal, state="not measured")
    if goal.kind == "ratio":
        return _judge_ratio(goal, result, ours)
    if goal.kind == "figure":
        # No leak at all is to be seen in any round.
        value = _worst(result, goal) if goal.metric == "leaked_upstreams" else ours.median
        return Verdict(goal=goal, state=_state(goal, value), value=value)
    theirs = find(result, goal, goal.against)
    if theirs is None:
        return Verdict(goal=goal, state="not measured")
    return Verdict(goal=goal, state=_state(goal, ours.median - theirs.median), value=ours.median - theirs.median)


def _judge_ratio(goal: Goal, result: Result, ours: Summary) -> Verdict:
    name = "ratio_vs_floor" if goal.against == FLOOR else "ratio_vs_peer"
    entry = ours if goal.against == FLOOR else find(result, goal, goal.against)
    value = None if entry is None else getattr(entry, name)
    if entry is None or value is None:
        return Verdict(goal=goal, state="not measured")
    low, high = entry.ci95[name]
    if min(entry.rounds, ours.rounds) < FEWEST_ROUNDS:
        return Verdict(goal=goal, state="not measured", value=value, interval=(low, high))
    wants_less, wants_more = goal.limit < 1 and not goal.at_least, goal.limit > 1 and goal.at_least
    claimed = (not wants_less or high < 1) and (not wants_more or low > 1)
    state = _state(goal, value) if claimed else "not reached"
    return Verdict(goal=goal, state=state, value=value, interval=(low, high))


def _state(goal: Goal, value: float) -> State:
    return "reached" if (value >= goal.limit if goal.at_least else value <= goal.limit) else "not reached"


def _worst(result: Result, goal: Goal) -> float:
    return max(
        trial.metrics[goal.metric]
        for trial in result.trials
        if trial.valid and trial.arm == OURS and trial.workload == goal.workload and goal.metric in trial.metrics
    )


def find(result: Result, goal: Goal, arm: str) -> Summary | None:
    """The figure that the goal is about, of that arm."""
    return figure(result, goal.workload, goal.metric, arm, goal.n)


def figure(result: Result, workload: str, metric: str, arm: str, n: int | None = None) -> Summary | None:
    """One summary entry; of the largest step if none is named."""
    found = [
        entry
        for entry in result.summary
        if (entry.workload, entry.metric, entry.arm) == (workload, metric, arm) and n in (None, entry.n)
    ]
    return max(found, key=lambda entry: entry.n, default=None)
