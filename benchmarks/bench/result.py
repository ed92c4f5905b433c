"""``result.json``: all that a benchmark run measured, and all that the report is made from."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.bench.histogram import Histogram

SCHEMA = "lumos-bench/1"


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, and what ran on it."""

    cpu: str
    cpus: int
    kernel: str
    python: str
    versions: dict[str, str]
    """Of our own packages; the arms' are with the arms."""
    first: bool = False
    """Arms ran before whatever else there was."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast the servers' core was over the run, by the yardstick's pieces of work."""

    fast_us: float
    """CPU time of a piece when the core is fast."""
    mean_slowdown: float
    """What a piece took on average, to that."""
    slow_share: float
    """Of the pieces, those that took more than 1.2 times as much."""
    pieces: int


class Lateness(msgspec.Struct, frozen=True):
    """Milliseconds; None of no events."""

    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float | None

    @classmethod
    def of(cls, histogram: Histogram) -> Lateness:
        """A histogram of nanoseconds, in short."""
        found = (histogram.percentile(percent) for percent in (50, 90, 99, 99.9, 100))
        return cls(*(None if ns is None else round(ns / 1e6, 4) for ns in found))


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Client and upstream without an arm between them, at more than a workload's load."""

    workload: str
    n: int
    """The workload's streams, as in its trials."""
    load: float
    """So many times the workload's."""
    streams: int
    events: int
    events_per_s: float
    client_late_ms: Lateness
    """Received behind written."""
    upstream_late_ms: Lateness
    """Written behind scheduled."""
    start_late_ms: Lateness
    """Connections opened behind scheduled."""
    client_cpu_us_per_event: float | None
    failed: int
    """Streams that failed, did not end, or were not exact."""
    valid: bool
    reason: str = ""
    """Why not."""


class Calibrations(msgspec.Struct, frozen=True):
    """Valid if all are."""

    valid: bool
    checks: list[Calibration]


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One of the servers that were compared."""

    name: str
    title: str
    requirements: list[str] = []
    versions: dict[str, str] = {}


class Trial(msgspec.Struct, kw_only=True):
    """One arm, one workload, one round. Invalid ones stay in, and out of the summary."""

    arm: str
    workload: str
    n: int
    """Streams, or whatever the workload is stepped by."""
    round: int
    valid: bool = True
    reason: str = ""
    metrics: dict[str, float] = {}
    """As measured."""
    in_pieces: dict[str, float] = {}
    """Those that depend on the core's speed, divided by the microseconds of a yardstick's piece at that time."""
    hist: dict[str, Histogram] = {}
    """By the metric that they are the distribution of, in nanoseconds."""

    def at_full_speed(self, speed: Speed | None) -> dict[str, float]:
        """The metrics as they would be on a core that is always fast; as measured where that is not known."""
        if speed is None:
            return self.metrics
        return self.metrics | {name: round(value * speed.fast_us, 4) for name, value in self.in_pieces.items()}


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one arm over all valid rounds."""

    metric: str
    workload: str
    n: int
    arm: str
    median: float
    rounds: int
    ratio_vs_floor: float | None = None
    """This arm's to the floor's."""
    ratio_vs_peer: float | None = None
    """Ours to this arm's."""
    ci95: dict[str, tuple[float, float]] = {}
    """Of the two ratios, by their names."""


class Result(msgspec.Struct, kw_only=True):
    """The whole file."""

    schema: str = SCHEMA
    seed: int
    git: str
    env: Environment
    calibration: Calibrations
    arms: list[Arm]
    speed: Speed | None = None
    """None: there was no yardstick, and all figures are as measured."""
    trials: list[Trial] = []
    summary: list[Summary] = []

    def rounds(self) -> str:
        """How many there were, in words."""
        count = 1 + max((trial.round for trial in self.trials), default=-1)
        return f"{count} round{'s' * (count != 1)}"


def save(result: Result, path: Path) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    unfinished.replace(path)


def load(path: Path) -> Result:
    """Raises ``msgspec.ValidationError`` for another schema's file."""
    result = msgspec.json.decode(path.read_bytes(), type=Result)
    if result.schema != SCHEMA:
        raise msgspec.ValidationError(f"{path} is {result.schema}, not {SCHEMA}")
    return result
