"""Trials to summary: medians over valid rounds, ratios to the floor and ours to each peer, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from benchmarks.bench.metrics import Metrics, passes
from benchmarks.bench.result import Speed, Summary, Trial
from benchmarks.bench.statistics import Interval, ratio_interval

OURS = "lumos"
FLOOR = "floor"
STEPPED = 0
"""The ``n`` of what is made of all steps of a workload."""


COMPARED = {
    "cpu_us_per_event",
    "cpu_us_per_stream",
    "steady_cpu_us_per_event",
    "mem_kib_per_stream",
    "streams_per_core",
    "events_per_s",
    "start_ms",
    "import_used_ms",
}


def is_compared(metric: str) -> bool:
    """Whether it gets ratios: an interval costs 20 ms, and nobody compares counts of streams."""
    return metric in COMPARED or metric.endswith((".p50", ".p99"))


class Key(NamedTuple):
    """One figure of one arm."""

    workload: str
    n: int
    metric: str
    arm: str


def derived(trials: Sequence[Trial], speed: Speed | None = None) -> list[Trial]:
    """What only all steps of a round together tell: streams per core, and how cost grows with streams."""
    rounds: dict[tuple[str, str, int], dict[int, Metrics]] = defaultdict(dict)
    for trial in trials:
        if trial.valid and trial.n != STEPPED:
            rounds[trial.arm, trial.workload, trial.round][trial.n] = trial.at_full_speed(speed)
    found = []
    for (arm, workload, number), steps in rounds.items():
        if metrics := _of_steps(workload, dict(sorted(steps.items()))):
            found.append(Trial(arm=arm, workload=workload, n=STEPPED, round=number, metrics=metrics))
    return found


def _of_steps(workload: str, steps: Mapping[int, Metrics]) -> Metrics:
    if len(steps) < 2:
        return {}
    if workload == "w3":
        return {"streams_per_core": streams_per_core(steps)}
    if workload == "flat-streams":
        costs = [
            metrics["steady_cpu_us_per_event"] for metrics in steps.values() if metrics.get("steady_cpu_us_per_event")
        ]
        return {"growth": round(costs[-1] / costs[0], 4)} if len(costs) == len(steps) else {}
    return {}


def streams_per_core(steps: Mapping[int, Metrics]) -> int:
    """The largest step that is held, all lower ones being held; 0 if not even the first is."""
    held = 0
    for n, metrics in steps.items():
        if not passes(metrics):
            break
        held = n
    return held


def summarize(trials: Sequence[Trial], *, seed: int, speed: Speed | None = None) -> list[Summary]:
    """One entry for each figure that at least one valid round has, at the core's full speed where that is known."""
    values: dict[Key, dict[int, float]] = defaultdict(dict)
    for trial in trials:
        if trial.valid:
            for metric, value in trial.at_full_speed(speed).items():
                values[Key(trial.workload, trial.n, metric, trial.arm)][trial.round] = value
    return [_summary(key, values, seed) for key in values]


def _summary(key: Key, values: Mapping[Key, Mapping[int, float]], seed: int) -> Summary:
    mine, compared = values[key], is_compared(key.metric)
    to_floor = _ratio(mine, values.get(key._replace(arm=FLOOR)), seed, compared=compared) if key.arm != FLOOR else None
    to_peer = _ratio(values.get(key._replace(arm=OURS)), mine, seed, compared=compared) if key.arm != OURS else None
    intervals = {"ratio_vs_floor": to_floor, "ratio_vs_peer": to_peer}
    return Summary(
        metric=key.metric,
        workload=key.workload,
        n=key.n,
        arm=key.arm,
        median=round(median(mine.values()), 4),
        rounds=len(mine),
        ratio_vs_floor=_short(to_floor),
        ratio_vs_peer=_short(to_peer),
        ci95={name: (round(i.low, 4), round(i.high, 4)) for name, i in intervals.items() if i is not None},
    )


def _ratio(
    ours: Mapping[int, float] | None, theirs: Mapping[int, float] | None, seed: int, *, compared: bool
) -> Interval | None:
    """None where there is no ratio: nothing in common, or a figure of 0."""
    if not compared or not ours or not theirs or not ours.keys() & theirs.keys():
        return None
    if min(*ours.values(), *theirs.values()) <= 0:
        return None
    return ratio_interval(ours, theirs, seed=seed)


def _short(interval: Interval | None) -> float | None:
    return None if interval is None else round(interval.ratio, 4)


def passing(trial: Trial) -> bool:
    """Whether an arm held the step."""
    return trial.valid and passes(trial.metrics)
