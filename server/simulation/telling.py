"""What ``lumos simulate`` says: traces, plans and tests on standard output, all else on standard error."""

from __future__ import annotations

import sys
from collections import Counter

import click

from .plan import Plan
from .plan_text import json_of, paste_of
from .seeds import Figures, cores, judge_seeds, simulate_within, verdict_of
from .shrink import failing, shrink

_PLACES = ("upstream", "tool", "client", "world")


def tell_one(plan: Plan) -> bool:
    """Act it, and print its trace; whether it went well."""
    outcome = simulate_within(plan)
    click.echo(outcome.trace, nl=False)
    figures = Figures()
    figures.add(verdict_of(outcome))
    figures.real_seconds = outcome.real_seconds
    _say(summary(figures))
    return not outcome.violations


def tell_plan(plan: Plan) -> None:
    """Print it as JSON."""
    click.echo(json_of(plan), nl=False)


def tell_many(seeds: range, processes: int | None, failures: int) -> bool:
    """Act the worlds of all those seeds and print what they came to; whether all went well."""
    progress = _Progress(len(seeds))
    figures = judge_seeds(seeds, processes or cores(), failures, progress.show)
    progress.clear()
    _say(summary(figures))
    return not figures.failed


def tell_shrunk(plan: Plan, *, as_json: bool) -> int:
    """Make a plan that fails smaller and print it as a test or as JSON; 1 as it fails, 0 if it does not."""
    ways = failing(simulate_within(plan).violations)
    if not ways:
        _say("nothing is violated: there is nothing to shrink")
        return 0
    progress = _Progress(0)

    def fails(candidate: Plan) -> bool:
        progress.count()
        return bool(ways & failing(simulate_within(candidate).violations))

    least = shrink(plan, fails)
    progress.clear()
    click.echo(json_of(least) if as_json else paste_of(least), nl=False)
    _say(f"{progress.done} smaller worlds were tried; the least one fails so:")
    for line in simulate_within(least).violations:
        _say(f"  {line}")
    return 1


def summary(figures: Figures) -> str:
    """What failed, and what happened in all."""
    lines = []
    for verdict in figures.failed:
        lines.append(f"seed {verdict.seed} fails:")
        lines += [f"  {line}" for line in verdict.violations]
    cpu = 1000 * figures.cpu_seconds / max(1, figures.worlds)
    ratio = figures.virtual_seconds / max(figures.real_seconds, 1e-9)
    counts = [_many(figures.worlds, "world"), _many(figures.runs, "run"), _many(figures.events, "event")]
    lines += [
        f"{len(figures.failed)} failed of {', '.join(counts)}",
        f"{figures.real_seconds:.1f} s on {_many(figures.processes, 'process')}, {cpu:.1f} ms of CPU for each world",
        f"virtual time went {ratio:,.0f} times as fast as real time",
        *_kinds(figures.kinds),
    ]
    return "\n".join(lines)


def _kinds(kinds: Counter[str]) -> list[str]:
    lines = []
    for place in _PLACES:
        of_place = {kind.removeprefix(f"{place} "): count for kind, count in kinds.items() if kind.startswith(place)}
        ranked = sorted(of_place.items(), key=lambda one: (-one[1], one[0]))
        if ranked:
            lines.append(f"{place + ':':9} " + ", ".join(f"{kind} {count:,}" for kind, count in ranked))
    return lines


def _many(count: int, what: str) -> str:
    plural = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{plural}"


def _say(text: str) -> None:
    click.echo(text, err=True)


class _Progress:
    """A line that is written over, on a terminal; else nothing."""

    def __init__(self, of: int) -> None:
        self.done = 0
        self._of = of
        self._shown = sys.stderr.isatty()

    def show(self, figures: Figures) -> None:
        """So far."""
        self.done = figures.worlds
        self._write(f"{self.done:,} of {self._of:,} worlds, {len(figures.failed)} failed")

    def count(self) -> None:
        """One more was tried."""
        self.done += 1
        self._write(f"{_many(self.done, 'smaller world')} tried")

    def clear(self) -> None:
        """Make place for what is said at the end."""
        self._write("")

    def _write(self, text: str) -> None:
        if self._shown:
            click.echo(f"\r{text:60}" + ("" if text else "\r"), nl=False, err=True)
