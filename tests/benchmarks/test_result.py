from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.bench.histogram import Histogram
from benchmarks.bench.result import Arm, Calibrations, Environment, Lateness, Result, Summary, Trial, load, save

RESULT = Result(
    seed=1,
    git="abc1234",
    env=Environment(cpu="Some CPU", cpus=2, kernel="6.18", python="3.11.7", versions={"trio": "0.35.0"}),
    calibration=Calibrations(valid=True, checks=[]),
    arms=[Arm(name="floor", title="Bare sockets")],
    trials=[
        Trial(arm="floor", workload="w5", n=50, round=0, metrics={"cpu": 9.5}, hist={"x": Histogram({3: 2}, 3)})
    ],
    summary=[
        Summary(
            metric="cpu_us_per_event", workload="w5", n=50, arm="lumos", median=15, rounds=3, ratio_vs_floor=1.6,
            ci95={"ratio_vs_floor": (1.5, 1.7)},
        )
    ],
)  # fmt: skip


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "build" / "result.json"
    save(RESULT, path)
    assert load(path) == RESULT
    assert [*msgspec.json.decode(path.read_bytes())] == [
        "schema", "seed", "git", "env", "calibration", "arms", "speed", "trials", "summary",
    ]  # fmt: skip
    assert [child.name for child in path.parent.iterdir()] == ["result.json"]


def test_another_schema(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    save(msgspec.structs.replace(RESULT, schema="lumos-bench/0"), path)
    with pytest.raises(msgspec.ValidationError, match="lumos-bench/0"):
        load(path)


def test_lateness_is_in_milliseconds() -> None:
    histogram = Histogram()
    histogram.add_all(range(0, 100_000_000, 1_000_000))
    lateness = Lateness.of(histogram)
    assert lateness.p50 == pytest.approx(49, rel=0.01)
    assert lateness.max == 99
    assert Lateness.of(Histogram()) == Lateness(None, None, None, None, None)
