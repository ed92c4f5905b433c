"""From trials to summary, goals, report page and table, all of results made by hand."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.bench.arms import ARMS
from benchmarks.bench.figures import FIGURES, TAILS
from benchmarks.bench.goals import FEWEST_ROUNDS, GOALS, PEERS, Goal, judge
from benchmarks.bench.histogram import Histogram
from benchmarks.bench.plots import Dot, Scale, dot_plot, number
from benchmarks.bench.report import main, page
from benchmarks.bench.result import (
    Arm,
    Calibration,
    Calibrations,
    Environment,
    Lateness,
    Result,
    Speed,
    Trial,
    load,
    save,
)
from benchmarks.bench.summary import derived, streams_per_core, summarize
from benchmarks.bench.table import readme_with, table
from benchmarks.bench.workloads import WORKLOADS

NAMES = ("lumos", "floor", *PEERS)
LATE = Lateness(0.1, 0.2, 0.3, 0.4, 0.5)
VOID = {"meta", "br"}


def trials_of(workload: str, metric: str, figures: dict[str, float], n: int = 1, rounds: int = 3) -> list[Trial]:
    """Each round a hundredth more than the one before."""
    return [
        Trial(arm=arm, workload=workload, n=n, round=number, metrics={metric: value * (1 + number / 100)})
        for number in range(rounds)
        for arm, value in figures.items()
    ]


def result_of(trials: list[Trial]) -> Result:
    check = Calibration(
        workload="w2", n=200, load=1.5, streams=300, events=9000, events_per_s=6000, client_late_ms=LATE,
        upstream_late_ms=LATE, start_late_ms=LATE, client_cpu_us_per_event=9, failed=0, valid=False, reason="a < b",
    )  # fmt: skip
    return Result(
        seed=1,
        git="abc1234",
        env=Environment(cpu="Some <CPU>", cpus=2, kernel="6.18", python="3.11.7", versions={}),
        calibration=Calibrations(valid=False, checks=[check]),
        arms=[Arm(name=name, title=f"The {name} & co", versions={"trio": "0.35"}) for name in NAMES],
        trials=trials,
        summary=summarize(trials, seed=1),
    )


@cache
def everything() -> Result:
    """For all tests: its many intervals take a second."""
    trials: list[Trial] = []
    for shown in FIGURES:
        trials += trials_of(shown.workload, shown.metric, {name: 2.0**i for i, name in enumerate(NAMES)}, shown.n or 0)
    for trial in trials:
        if (trial.workload, trial.n) in {(workload, n) for workload, n, _ in TAILS}:
            trial.hist["event_lateness_ms"] = Histogram({1000: 5, 2000: 3}, 70_000_000)
    trials.append(Trial(arm="litellm", workload="w5", n=50, round=2, valid=False, reason="<it> ended"))
    trials.append(Trial(arm="litellm", workload="w4", n=50, round=2, metrics={"failed": 3, "streams": 50}))
    return result_of(trials)


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects texts and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_shows_all_arms_and_needs_nothing_from_elsewhere() -> None:
    result = everything()
    text = page(result)
    read = Page(text)
    assert "script" not in read.tags
    assert read.addresses == []
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    plots = [part.partition("</svg>")[0] for part in text.split("<svg")[1:]]
    assert len(plots) == len(FIGURES) + len(TAILS)
    for plot in plots:
        root = ElementTree.fromstring(f"<svg{plot}</svg>")
        shown = {"".join(text.itertext()) for text in root.iter() if text.tag in ("text", "title")}
        assert {arm.title for arm in result.arms} <= shown
    assert "a < b" in "".join(read.texts)
    assert "<it> ended" in read.texts
    assert "3 of 50" in read.texts


def test_page_and_table_are_of_the_core_at_full_speed_and_say_so() -> None:
    trials = trials_of("w5", "cpu_us_per_event", {"lumos": 10, "floor": 5}, 50)
    for trial in trials:
        trial.in_pieces = {"cpu_us_per_event": 0.04}
    trials[-1].in_pieces = {}
    result = result_of(trials)
    result.speed = Speed(fast_us=200, mean_slowdown=1.37, slow_share=0.758, pieces=9)
    result.summary = summarize(trials, seed=1, speed=result.speed)
    assert "| **8** |" in table(result)
    text = page(result)
    read = Page(text)
    assert "8" in read.texts
    [(least, most)] = re.findall(r'class="ours">.*?class="spread" x1="([\d.]+)" x2="([\d.]+)"', text)
    assert least == most, "each round's, too"
    for text in (" ".join(read.texts), table(result)):
        assert "slow for 76% of the time, and a piece took 1.37 times a fast one's time" in text
    assert "Trials told as measured, with no yardstick beside them: 1" in read.texts


def test_a_result_with_nothing_in_it_has_a_page() -> None:
    read = Page(page(result_of([])))
    assert "not measured" in read.texts
    assert "svg" not in read.tags


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    save(everything(), tmp_path / "result.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    done = CliRunner().invoke(main, [str(tmp_path / "result.json"), "--readme", str(readme)])
    assert done.exit_code == 0, done.output
    text = table(load(tmp_path / "result.json"))
    assert readme.read_text() == f"before\n<!-- bench -->\n{text}\n<!-- /bench -->\nafter\n"
    assert (tmp_path / "report.html").exists()
    assert readme_with(text, readme.read_text()) == readme.read_text()
    with pytest.raises(ValueError, match="once each"):
        readme_with(text, "nothing")


def test_the_table_tells_how_many_times_ours_and_only_what_is_beyond_chance() -> None:
    trials = trials_of("w5", "cpu_us_per_event", {"lumos": 10, "floor": 5, "litellm": 250}, 50)
    trials += [
        Trial(arm="fastapi-httpx", workload="w5", n=50, round=number, metrics={"cpu_us_per_event": value})
        for number, value in enumerate((5, 10, 20))
    ]
    lines = {line.split(" | ")[0]: line for line in table(result_of(trials)).splitlines()}
    assert lines["| **The lumos & co**"].endswith("| **10.1** |")
    assert lines["| The litellm & co"].endswith("| 252 (25\N{MULTIPLICATION SIGN}) |")
    assert lines["| The fastapi-httpx & co"].endswith("| 10 |")
    assert lines["| The pydantic-ai & co"].endswith("| \N{EN DASH} |")
    alone = result_of(trials_of("w5", "cpu_us_per_event", {"lumos": 10, "litellm": 250}, 50, rounds=1))
    assert "| 250 |" in table(alone)


def test_ratios_are_of_rounds_that_count() -> None:
    trials = trials_of("w5", "cpu_us_per_event", {"lumos": 10, "floor": 5, "litellm": 200})
    trials.append(Trial(arm="lumos", workload="w5", n=1, round=9, valid=False, metrics={"cpu_us_per_event": 900}))
    found = {entry.arm: entry for entry in summarize(trials, seed=1)}
    assert (found["lumos"].median, found["lumos"].rounds) == (10.1, 3)
    assert (found["lumos"].ratio_vs_floor, found["lumos"].ratio_vs_peer) == (2, None)
    assert (found["litellm"].ratio_vs_floor, found["litellm"].ratio_vs_peer) == (40, 0.05)
    assert found["litellm"].ci95 == {"ratio_vs_floor": (40, 40), "ratio_vs_peer": (0.05, 0.05)}
    [none] = summarize(trials_of("w6", "leaked_upstreams", {"lumos": 0}), seed=1)
    assert (none.median, none.ci95) == (0, {})


def goal(**more: object) -> Goal:
    plain = {"title": "t", "workload": "w5", "metric": "cpu_us_per_event", "limit": 0.5}
    return Goal(**{**plain, **more})  # type: ignore[arg-type]


FIGURES_OF_A_METRIC = {"lumos": 10.0, "floor": 5.0, "litellm": 30.0, "fastapi-openai": 10.0}


@pytest.mark.parametrize(
    ("wanted", "state"),
    [
        (goal(against="litellm", kind="ratio", limit=0.34), "reached"),
        (goal(against="litellm", kind="ratio", limit=0.33), "not reached"),
        (goal(against="floor", kind="ratio", limit=2), "reached"),
        (goal(against="floor", kind="ratio", limit=1.9), "not reached"),
        (goal(against="floor", kind="ratio", limit=1.9, at_least=True), "reached"),
        (goal(against="floor", kind="difference", limit=5.2), "reached"),
        (goal(against="floor", kind="difference", limit=4.9), "not reached"),
        (goal(limit=10.1), "reached"),
        (goal(limit=10), "not reached"),
        (goal(against="pydantic-ai", kind="ratio"), "not measured"),
        (goal(against="pydantic-ai", kind="difference"), "not measured"),
        (goal(workload="w1"), "not measured"),
        (goal(n=7), "not measured"),
    ],
    ids=str,
)
def test_goals_are_judged(wanted: Goal, state: str) -> None:
    result = result_of(trials_of("w5", "cpu_us_per_event", FIGURES_OF_A_METRIC, 50))
    assert judge(wanted, result).state == state


def test_no_claim_without_an_interval() -> None:
    few = result_of(trials_of("w5", "cpu_us_per_event", FIGURES_OF_A_METRIC, 50, rounds=FEWEST_ROUNDS - 1))
    assert judge(goal(against="litellm", kind="ratio"), few).state == "not measured"
    trials = [
        Trial(arm=arm, workload="w5", n=50, round=number, metrics={"cpu_us_per_event": value})
        for arm, values in {"lumos": (1, 4, 4), "litellm": (10, 10, 2)}.items()
        for number, value in enumerate(values)
    ]
    verdict = judge(goal(against="litellm", kind="ratio"), result_of(trials))
    assert verdict.value == 0.4
    assert verdict.interval is not None
    assert verdict.interval[1] > 1
    assert verdict.state == "not reached"


def test_the_import_of_what_an_agent_needs_is_a_goal_beside_the_packages_and_compared_in_its_place() -> None:
    trials = trials_of("w8", "import_ms", {"lumos": 2, "litellm": 2000})
    trials += trials_of("w8", "import_used_ms", {"lumos": 150, "litellm": 2000})
    result = result_of(trials)
    states = {wanted.metric: judge(wanted, result).state for wanted in GOALS if wanted.metric.startswith("import")}
    assert states == {"import_ms": "reached", "import_used_ms": "not reached"}
    assert "import of what an agent needs, provider left out, over a bare interpreter" in Page(page(result)).texts
    ratios = {entry.metric: entry.ratio_vs_peer for entry in result.summary if entry.arm == "litellm"}
    assert ratios == {"import_ms": None, "import_used_ms": 0.075}


def test_one_leak_in_one_round_is_a_leak() -> None:
    trials = trials_of("w6-stream", "leaked_upstreams", {"lumos": 0})
    leaks = goal(workload="w6-stream", metric="leaked_upstreams", limit=0)
    assert judge(leaks, result_of(trials)).state == "reached"
    trials[1].metrics["leaked_upstreams"] = 1
    assert judge(leaks, result_of(trials)).state == "not reached"


def test_goals_are_of_workloads_and_arms_that_there_are() -> None:
    steps = {workload.name: {step.n for step in (*workload.full,)} for workload in WORKLOADS}
    for wanted in GOALS:
        assert wanted.workload in {*steps, "w8", "w9"}
        assert wanted.n in {None, 0} | steps.get(wanted.workload, set())
        assert wanted.against in {"", *(arm.name for arm in ARMS)}
    for shown in FIGURES:
        assert shown.n in {None, 0} | steps.get(shown.workload, set())


def test_streams_per_core_stops_at_the_first_step_that_is_not_held() -> None:
    good = {"event_lateness_ms.p99": 1.0, "ttfe_added_ms.p99": 1.0, "failed": 0}
    bad = {**good, "failed": 1}
    assert streams_per_core({10: good, 20: good, 30: bad, 40: good}) == 20
    assert streams_per_core({10: bad, 20: good}) == 0
    trials = [Trial(arm="lumos", workload="w3", n=n, round=0, metrics=good) for n in (20, 10)]
    [found] = derived(trials)
    assert (found.n, found.metrics) == (0, {"streams_per_core": 20})
    assert derived(trials[:1]) == []
    trials = [
        Trial(arm="lumos", workload="flat-streams", n=n, round=0, metrics={"steady_cpu_us_per_event": cost})
        for n, cost in ((1000, 22.0), (1, 20.0))
    ]
    assert derived(trials)[0].metrics == {"growth": 1.1}


def test_numbers_and_scales() -> None:
    numbers = (0, 0.0123456, 0.5, 1, 3.14159, 20, 99.4, 1234567)
    assert [number(value) for value in numbers] == ["0", "0.0123", "0.5", "1", "3.14", "20", "99.4", "1,234,567"]
    scale = Scale(1, 100, 0, 200)
    assert [scale.at(value) for value in (0.1, 1, 10, 100, 1000)] == [0, 0, pytest.approx(100), 200, 200]
    assert scale.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert Scale(1, 1e6, 0, 1).ticks() == [10.0**power for power in range(7)]
    assert dot_plot("t", "ms", [Dot("none", 0, 0, 0, "k0")]) == ""


def test_a_result_is_the_same_once_stored(tmp_path: Path) -> None:
    result = everything()
    save(result, tmp_path / "result.json")
    assert load(tmp_path / "result.json") == result
    assert msgspec.json.decode((tmp_path / "result.json").read_bytes())["schema"] == "lumos-bench/1"
