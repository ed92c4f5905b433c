"""``result.json`` to ``report.html``, one page without scripts or anything from elsewhere, and to the README's table.

python -m benchmarks.bench.report build/bench/result.json [--readme README.md]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import click

from benchmarks.bench.figures import FIGURES, TAILS
from benchmarks.bench.goals import GOALS, Verdict, figure, judge
from benchmarks.bench.histogram import Histogram
from benchmarks.bench.plots import Dot, Line, dot_plot, number, tail_plot
from benchmarks.bench.result import Arm, Result, Summary, load
from benchmarks.bench.summary import FLOOR, OURS
from benchmarks.bench.table import about_speed, readme_with, table

TIMES = "\N{MULTIPLICATION SIGN}"
TO = " \N{EN DASH} "
_STYLE = Path(__file__).with_name("report.css")


def write_report(result: Result, folder: Path) -> Path:
    """Where it was put."""
    path = folder / "report.html"
    path.write_text(page(result))
    return path


def page(result: Result) -> str:
    """The whole page."""
    sections = [_head(result), *_plots(result), _tails(result), _goals(result), _summary(result), _validity(result)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Lumos: benchmark</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE.read_text()}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _head(result: Result) -> str:
    env = result.env
    rows = [[arm.title, ", ".join(f"{name} {number}" for name, number in arm.versions.items())] for arm in result.arms]
    return (
        f"<h1>Lumos and its peers</h1><p>{escape(env.cpu)}, {env.cpus} CPUs, Linux {escape(env.kernel)}, Python "
        f"{escape(env.python)}; commit {escape(result.git)}; {result.rounds()}, all arms in each"
        f"{', and each before whatever else ran on its core' * env.first}. Medians over rounds; "
        f"lines show the least and the most of them. Axes are logarithmic.</p><p>{escape(about_speed(result))}</p>"
        f"<details><summary>Arms and versions</summary>{_table(['arm', 'versions'], rows)}</details>"
    )


def _kinds(arms: Sequence[Arm]) -> dict[str, str]:
    """A CSS class for each arm, by its name."""
    peers = [arm.name for arm in arms if arm.name not in (OURS, FLOOR)]
    return {OURS: "ours", FLOOR: "floor"} | {name: f"k{place % 7}" for place, name in enumerate(peers)}


def _plots(result: Result) -> Iterable[str]:
    kinds = _kinds(result.arms)
    for shown in FIGURES:
        dots = []
        for arm in result.arms:
            if entry := figure(result, shown.workload, shown.metric, arm.name, shown.n):
                values = _values(result, entry)
                dots.append(Dot(arm.title, entry.median, min(values), max(values), kinds[arm.name]))
        if plot := dot_plot(shown.title, shown.unit, dots):
            yield f"<h2>{escape(shown.title)}</h2><figure><figcaption>{escape(shown.note)}</figcaption>{plot}</figure>"


def _values(result: Result, entry: Summary) -> list[float]:
    return [
        figures[entry.metric]
        for trial in result.trials
        if trial.valid
        and (trial.arm, trial.workload, trial.n) == (entry.arm, entry.workload, entry.n)
        and entry.metric in (figures := trial.at_full_speed(result.speed))
    ]


def _tails(result: Result) -> str:
    kinds = _kinds(result.arms)
    found = []
    for workload, n, title in TAILS:
        lines = []
        for arm in result.arms:
            all_rounds = Histogram()
            for trial in result.trials:
                if trial.valid and (trial.arm, trial.workload, trial.n) == (arm.name, workload, n):
                    all_rounds.merge(trial.hist.get("event_lateness_ms", Histogram()))
            lines.append(Line(arm.title, all_rounds, kinds[arm.name]))
        if plot := tail_plot(title, lines):
            note = "Which share of events came later than that, all rounds together."
            found.append(
                f"<h2>How late events are: {escape(title)}</h2><figure><figcaption>{note}</figcaption>{plot}</figure>"
            )
    return "".join(found)


def _goals(result: Result) -> str:
    verdicts = [judge(goal, result) for goal in GOALS]
    counts = {state: sum(v.state == state for v in verdicts) for state in ("reached", "not reached", "not measured")}
    titles = {arm.name: arm.title for arm in result.arms}
    rows = "".join(_goal_row(verdict, titles) for verdict in verdicts)
    right = "".join(f'<th class="n">{name}</th>' for name in ("limit", "found", "95 %"))
    head = f"<tr><th>goal</th><th>against</th>{right}<th></th></tr>"
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f'<h2>Goals</h2><p>{text}.</p><div class="scroll"><table>{head}{rows}</table></div>'


def _goal_row(verdict: Verdict, titles: dict[str, str]) -> str:
    goal = verdict.goal
    sign = "≥" if goal.at_least else "≤"
    unit = f" {goal.unit}" if goal.unit else ""
    limit = f"{sign} {number(goal.limit)}{TIMES if goal.kind == 'ratio' else unit}"
    found = "" if verdict.value is None else number(verdict.value)
    interval = "" if verdict.interval is None else TO.join(map(number, verdict.interval))
    against = titles.get(goal.against, goal.against)
    return (
        f"<tr><td>{escape(goal.title)}</td><td>{escape(against)}</td>"
        f'<td class="n">{limit}</td><td class="n">{found}</td>'
        f'<td class="n">{interval}</td><td class="{verdict.state.replace(" ", "-")}">{verdict.state}</td></tr>'
    )


def _summary(result: Result) -> str:
    titles = {arm.name: arm.title for arm in result.arms}
    rows = [
        [
            f"{entry.workload} n={entry.n}",
            entry.metric,
            titles.get(entry.arm, entry.arm),
            number(entry.median),
            _with_interval(entry, "ratio_vs_floor"),
            _with_interval(entry, "ratio_vs_peer"),
            str(entry.rounds),
        ]
        for entry in result.summary
    ]
    head = ["workload", "metric", "arm", "median", "to the floor", "ours to it", "rounds"]
    return f"<h2>All figures</h2><details><summary>{len(rows)} rows</summary>{_table(head, rows)}</details>"


def _with_interval(entry: Summary, name: str) -> str:
    ratio = getattr(entry, name)
    if ratio is None:
        return ""
    low, high = entry.ci95[name]
    return f"{number(ratio)} ({number(low)}{TO}{number(high)})"


def _validity(result: Result) -> str:
    checks = [
        [
            f"{check.workload} n={check.n}",
            f"{check.load:g}{TIMES}",
            f"{check.events_per_s:,.0f}",
            _ms(check.client_late_ms.p99),
            _ms(check.upstream_late_ms.p99),
            "valid" if check.valid else f"NOT VALID: {check.reason}",
        ]
        for check in result.calibration.checks
    ]
    head = ["step", "load", "events/s", "client late p99 ms", "upstream late p99 ms", ""]
    bad = [
        [trial.arm, f"{trial.workload} n={trial.n}", str(trial.round + 1), trial.reason]
        for trial in result.trials
        if not trial.valid
    ]
    errors = [
        [
            trial.arm,
            f"{trial.workload} n={trial.n}",
            str(trial.round + 1),
            f"{trial.metrics['failed']:.0f} of {trial.metrics['streams']:.0f}",
        ]
        for trial in result.trials
        if trial.metrics.get("failed")
    ]
    measured = [
        [trial.arm, f"{trial.workload} n={trial.n}", str(trial.round + 1)]
        for trial in result.trials
        if result.speed and "cpu_us_per_event" in trial.metrics.keys() - trial.in_pieces.keys()
    ]
    return (
        f"<h2>Client and upstream without an arm between them</h2>{_table(head, checks)}"
        f"<h2>Trials that do not count: {len(bad)}</h2>{_table(['arm', 'step', 'round', 'why'], bad) if bad else ''}"
        f"<h2>Trials with failed or unfinished streams: {len(errors)}</h2>"
        f"{_table(['arm', 'step', 'round', 'streams'], errors) if errors else ''}"
        f"<h2>Trials told as measured, with no yardstick beside them: {len(measured)}</h2>"
        f"{_table(['arm', 'step', 'round'], measured) if measured else ''}"
    )


def _ms(value: float | None) -> str:
    return "" if value is None else number(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{titles}</tr>{lines}</table></div>'


@click.command()
@click.argument("result_file", type=click.Path(exists=True, path_type=Path))
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the table between its markers.")
def main(result_file: Path, readme: Path | None) -> None:
    """Make the page, and print the table."""
    result = load(result_file)
    click.echo(write_report(result, result_file.parent))
    click.echo(table(result))
    if readme is not None:
        readme.write_text(readme_with(table(result), readme.read_text()))


if __name__ == "__main__":
    main()
