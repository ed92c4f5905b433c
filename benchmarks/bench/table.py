"""The README's table: a row for each arm, a column for each figure, all from one result."""

from __future__ import annotations

from benchmarks.bench.figures import FIGURES, Figure
from benchmarks.bench.goals import FEWEST_ROUNDS, figure
from benchmarks.bench.plots import number
from benchmarks.bench.result import Result
from benchmarks.bench.summary import OURS

BEGIN = "<!-- bench -->"
END = "<!-- /bench -->"


def table(result: Result) -> str:
    """Markdown: medians; after each, in parentheses, how many times ours it is, where that is beyond chance."""
    columns = [shown for shown in FIGURES if shown.column and _measured(result, shown)]
    lines = ["| | " + " | ".join(shown.column for shown in columns) + " |", "|---|" + "--:|" * len(columns)]
    for arm in result.arms:
        cells = [_cell(result, shown, arm.name) for shown in columns]
        title = f"**{arm.title}**" if arm.name == OURS else arm.title
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    env = result.env
    lines += [
        "",
        f"Medians of {result.rounds()}; in parentheses, how many times ours, where the 95 % interval leaves 1 out.",
    ]
    lines += [about_speed(result)]
    lines += [f"{env.cpu} ({env.cpus} CPUs), Linux {env.kernel}, Python {env.python}; commit {result.git}."]
    return "\n".join(lines)


def about_speed(result: Result) -> str:
    """Which figures are told at the core's full speed, and how slow it was; one or two sentences."""
    speed = result.speed
    if speed is None:
        return "All figures are as measured: how fast the servers' core was meanwhile is not known."
    return (
        "CPU and the times of requests one at a time are told at the servers' core's full speed: divided by how much "
        "longer a fixed piece of work took on it at the same time; all other figures are as measured. "
        f"The core was slow for {speed.slow_share:.0%} of the time, and a piece took {speed.mean_slowdown:.2f} "
        "times a fast one's time on average."
    )


def _measured(result: Result, shown: Figure) -> bool:
    return any(figure(result, shown.workload, shown.metric, arm.name, shown.n) for arm in result.arms)


def _cell(result: Result, shown: Figure, arm: str) -> str:
    entry = figure(result, shown.workload, shown.metric, arm, shown.n)
    if entry is None:
        return "\N{EN DASH}"
    if arm == OURS:
        return f"**{number(entry.median)}**"
    low, high = entry.ci95.get("ratio_vs_peer", (1, 1))
    if not entry.ratio_vs_peer or low <= 1 <= high or entry.rounds < FEWEST_ROUNDS:
        return number(entry.median)
    return f"{number(entry.median)} ({number(1 / entry.ratio_vs_peer)}\N{MULTIPLICATION SIGN})"


def readme_with(text: str, readme: str) -> str:
    """The README with the text between its markers.

    Raises:
        ValueError: it has no markers, or more than one pair.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the text has to have {BEGIN} and {END} once each, in that order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
