"""The benchmark itself, small, with real servers; and the guard of the speed that is there."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median

import msgspec
import pytest
from click import UsageError

from benchmarks.bench import machine, metrics
from benchmarks.bench.arms import ARMS, Arm, find_arm, started
from benchmarks.bench.calibration import Limits
from benchmarks.bench.drive import running_upstream
from benchmarks.bench.report import page
from benchmarks.bench.result import Result, Trial, load
from benchmarks.bench.run import Plan, Screen, plan_of, run
from benchmarks.bench.special import import_metrics
from benchmarks.bench.table import table
from benchmarks.bench.trial import Parts, Place, warm_up
from benchmarks.bench.turns import Turn
from benchmarks.bench.workloads import MODEL, Step, Workload, spread

TINY = Workload(
    name="w2",
    title="Tiny",
    about="five streams of five events",
    measures=(metrics.first_times, metrics.lateness, metrics.cost),
    short=(Step(n=5, script="paced-50x5", starts_s=spread(5, 0.1), limits=Limits(None, None, None)),),
)
ONE = Step(n=1, script="one", starts_s=[0.0] * 20, one_at_a_time=True)
FLOOD = Step(n=5, script="flood-4000", starts_s=[0.0] * 5)
"""Long answers: of W5's own, 200 events long, the request is nine tenths, which w1 guards."""

GUARDED = {"w1": (ONE, 20.0), "w5": (FLOOD, 16.0)}
"""The step, and our CPU time by event as a multiple of the floor's, as last measured: lower it with each gain."""

SLACK = 2.0
GUARD_ROUNDS = 3


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    broken = Arm(name="broken", title="Broken", packages=("trio",), module="no_such_module")
    arms = [find_arm("lumos"), find_arm("floor"), broken]
    plan = Plan(arms=arms, workloads=[TINY], special=[], rounds=1, full=False)
    result = run(plan, tmp_path / "result.json", Screen())
    assert load(tmp_path / "result.json") == result
    assert [(check.workload, check.failed) for check in result.calibration.checks] == [("w2", 0)]
    trials = {(trial.arm, trial.workload): trial for trial in result.trials}
    for name in ("lumos", "floor"):
        trial = trials[name, "w2"]
        assert trial.valid, trial.reason
        assert (trial.metrics["streams"], trial.metrics["failed"], trial.metrics["events"]) == (5, 0, 25)
        assert trial.hist["event_lateness_ms"].total == 25
        assert 0 < trial.metrics["ttfe_added_ms.p50"] <= trial.metrics["ttfe_ms.p50"]
        assert trials[name, "w8"].metrics["start_ms"] > 0
    assert not trials["broken", "start"].valid
    assert "the server ended" in trials["broken", "start"].reason
    [ours] = [entry for entry in result.summary if (entry.arm, entry.metric) == ("lumos", "cpu_us_per_event")]
    assert ours.ratio_vs_floor is not None
    assert_told_at_full_speed(result)
    assert "the server ended" in page(result)


def assert_told_at_full_speed(result: Result) -> None:
    """Where there is a core for the arm, and so a yardstick."""
    speed = result.speed
    assert (speed is None) == (machine.cores().arm is None)
    for entry in result.summary:
        [trial] = [
            each for each in result.trials if each.valid and (each.arm, each.workload) == (entry.arm, entry.workload)
        ]
        if entry.metric.startswith("cpu_us_per_") and speed is not None:
            assert entry.median == pytest.approx(trial.in_pieces[entry.metric] * speed.fast_us, rel=1e-3)
            assert 0 < entry.median <= 2 * trial.metrics[entry.metric]
        else:
            assert entry.median == round(trial.metrics[entry.metric], 4)


def test_our_package_is_imported_in_a_fraction_of_what_an_agent_needs() -> None:
    found = import_metrics(find_arm("lumos"))
    assert found["import_ms"] < found["import_used_ms"] / 4


def test_on_one_core_a_run_does_without_a_yardstick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench.machine.cores", lambda *, first: machine.Cores(None, None, first))
    plan = Plan(arms=[find_arm("floor")], workloads=[TINY], special=[], rounds=1, full=False)
    result = run(plan, tmp_path / "result.json", Screen())
    assert result.speed is None
    [trial] = [each for each in result.trials if each.workload == "w2"]
    assert trial.valid, trial.reason
    assert trial.in_pieces == {}
    [cost] = [entry for entry in result.summary if entry.metric == "cpu_us_per_event"]
    assert cost.median == round(trial.metrics["cpu_us_per_event"], 4)
    assert "as measured" in page(result)
    assert "as measured" in table(result)


def test_what_is_measured_is_kept_if_the_run_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, kept = tmp_path / "result.json", []

    def interrupted(*_: object, **__: object) -> Trial:
        kept.extend(load(out).trials)
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.bench.run.Parts.do", interrupted)
    plan = Plan(arms=[find_arm("floor")], workloads=[TINY], special=[], rounds=2, full=False)
    with pytest.raises(KeyboardInterrupt):
        run(plan, out, Screen())
    assert [(trial.arm, trial.workload) for trial in kept] == [("floor", "w8")]
    result = load(out)
    assert result.trials == kept
    assert {entry.metric for entry in result.summary} == {"start_ms"}
    assert (tmp_path / "report.html").exists()


def test_options() -> None:
    assert [arm.name for arm in plan_of("", "", None, full=False).arms] == [a.name for a in ARMS if not a.optional]
    chosen = plan_of("floor,lumos", "w5,w9", 2, full=False)
    assert [arm.name for arm in chosen.arms] == ["floor", "lumos"]
    assert [workload.name for workload in chosen.workloads] == ["w5"]
    assert (chosen.special, chosen.rounds) == (["w9"], 2)
    everything = plan_of("", "", None, full=True)
    assert (everything.special, everything.rounds) == (["w8", "w9"], 7)
    with pytest.raises(UsageError, match="no arm 'x'"):
        plan_of("x", "", None, full=False)
    with pytest.raises(UsageError, match="no workload 'x'"):
        plan_of("", "x", None, full=False)
    with pytest.raises(UsageError, match="'x'"):
        plan_of("", "", None, full=False, streams="x")


def test_of_workloads_in_steps_those_of_so_many_streams_are_done_and_all_of_others() -> None:
    plan = plan_of("", "w1,w2,w3", None, full=True, streams="200,20")
    assert [[step.n for step in plan.steps(workload)] for workload in plan.workloads] == [[1], [200], [20]]


def test_arm_and_instruments_have_cores_of_their_own() -> None:
    cores = machine.cores()
    assert cores.arm != cores.instruments or cores == machine.Cores(None, None)


def test_the_speed_does_not_rot() -> None:
    """Our CPU time against the floor's, of W1 and W5 in small.

    It does not flake: CPU times and no clock; the least of ours against the median of the floor's, so that whatever
    else the machine does can only help; and twice what was measured.
    """
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    with running_upstream() as upstream:
        place = Place(upstream, None, lambda _: None)
        with (
            started(find_arm("lumos"), upstream.base_url, (MODEL,)) as ours,
            started(find_arm("floor"), upstream.base_url, (MODEL,)) as floor,
        ):
            for running in (ours, floor):
                warm_up(place, running, 800_000)
            for number in range(GUARD_ROUNDS):
                for running in (ours, floor):
                    for name, (step, _) in GUARDED.items():
                        workload = msgspec.structs.replace(TINY, name=name, measures=(metrics.cost,))
                        tag = 1_000 * number + (500 if step is FLOOD else 0)
                        trial = Parts().do(place, running, Turn(workload, step, tag), number=number)
                        assert trial is not None
                        assert trial.metrics["failed"] == 0
                        costs[name, running.arm.name].append(trial.metrics["cpu_us_per_event"])
    for name, (_, measured) in GUARDED.items():
        ratio = min(costs[name, "lumos"]) / median(costs[name, "floor"])
        assert ratio <= SLACK * measured, f"{name}: an event costs {ratio:.1f} times the floor's"
