"""The benchmark: all arms, all workloads, round by round, into one ``result.json`` and its report.

    python -m benchmarks.bench.run [--full] [--arms A,B] [--workloads w1,w5] [--streams 200] [--rounds N] [--out FILE]

In each round every arm is started anew, in an order that turns with the rounds, and does every workload. What an arm
fails at is in the result and does not end the run.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import msgspec

from benchmarks.bench import environments, machine
from benchmarks.bench.arms import ARMS, Arm, RunningArm, find_arm, started
from benchmarks.bench.calibration import Limits, calibrate, line
from benchmarks.bench.drive import RunningUpstream, running_upstream
from benchmarks.bench.environments import EnvironmentFailedError
from benchmarks.bench.job import Progress
from benchmarks.bench.process import ServerFailedError, on_core
from benchmarks.bench.report import write_report
from benchmarks.bench.result import Arm as ArmTold
from benchmarks.bench.result import Calibration, Calibrations, Result, Speed, Trial, save
from benchmarks.bench.special import REPLAY, START, replay_trial, start_trial
from benchmarks.bench.summary import OURS, derived, passing, summarize
from benchmarks.bench.table import table
from benchmarks.bench.trial import Parts, Place, warm_up
from benchmarks.bench.turns import turns
from benchmarks.bench.workloads import MODEL, Step, Workload, selected, steps_of, to_job
from benchmarks.bench.yardstick import Yardstick, running_yardstick

SEED = 20261123
_WARM_UP_TAG = 800_000
_FAILURES = (ServerFailedError, EnvironmentFailedError, OSError, RuntimeError, msgspec.MsgspecError)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run.

    Attributes:
        special: names of workloads that are no load on an arm.
        streams: of a workload that has steps of these ``n``, those alone; of any other, all. None are all of each.
    """

    arms: Sequence[Arm]
    workloads: Sequence[Workload]
    special: Sequence[str]
    rounds: int
    full: bool
    first: bool = False
    streams: Sequence[int] = ()

    def steps(self, workload: Workload) -> Sequence[Step]:
        """Those of the workload's that are to be done."""
        steps = steps_of(workload, full=self.full)
        return [step for step in steps if step.n in self.streams] or steps


class Screen:
    """Lines for people on stderr: what is being done, and how far it is where somebody looks."""

    def __init__(self) -> None:
        self._shown = False
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        click.echo(f"{minutes:3}:{seconds:02} {text}", err=True)

    def progress(self, what: str, streams: int) -> Callable[[Progress], None]:
        """A bar for the client's progress lines, on terminals alone."""
        interactive = sys.stderr.isatty()

        def show(progress: Progress) -> None:
            if interactive:
                done = 20 * progress.ended // max(streams, 1)
                bar = "#" * done + "-" * (20 - done)
                self._clear()
                click.echo(
                    f"       {what:34} [{bar}] {progress.ended}/{streams}, {progress.events} events", err=True, nl=False
                )
                self._shown = True

        return show

    def _clear(self) -> None:
        if self._shown:
            click.echo("\r\x1b[2K", err=True, nl=False)
            self._shown = False


class Runner:
    """One run; ``trials`` and ``checks`` fill as it goes.

    Attributes:
        keep: called after each trial.
        whole: so many of the trials are of arms that have done all steps of their round.
    """

    def __init__(
        self,
        plan: Plan,
        upstream: RunningUpstream,
        screen: Screen,
        cores: machine.Cores,
        yardstick: Yardstick | None = None,
    ) -> None:
        self._plan, self._upstream, self._screen, self._cores = plan, upstream, screen, cores
        self._yardstick = yardstick
        self.trials: list[Trial] = []
        self.checks: list[Calibration] = []
        self.keep: Callable[[], None] = lambda: None
        self.whole = 0

    def speed(self) -> Speed | None:
        """The arms' core's, until now."""
        return None if self._yardstick is None else self._yardstick.pieces().speed()

    def calibrate(self) -> None:
        """Every step that can be, once."""
        for workload, step in self._steps():
            if step.limits is not None and not step.agent:
                self.checks.append(self._check(workload.name, step, step.limits))
                self._screen.say(line(self.checks[-1]))

    def _check(self, workload: str, step: Step, limits: Limits) -> Calibration:
        show = self._screen.progress(f"calibration {workload} n={step.n}", len(step.starts_s))
        job = to_job(step, self._upstream.port, "", {}, "")
        cpu = self._cores.instruments
        return calibrate(job, step.script, self._upstream, workload=workload, limits=limits, cpu=cpu, on_progress=show)

    def _steps(self) -> Iterator[tuple[Workload, Step]]:
        for workload in self._plan.workloads:
            for step in self._plan.steps(workload):
                yield workload, step

    def round(self, number: int) -> None:
        """Every arm once."""
        arms = self._plan.arms
        turn = number % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            began = time.monotonic()
            before = len(self.trials)
            try:
                self._arm(arm, number)
            except _FAILURES as error:
                self._note_failure(arm, "start", 0, number, error)
            self.whole = len(self.trials)
            bad = [trial for trial in self.trials[before:] if not trial.valid]
            tail = f"; NOT VALID: {', '.join(f'{t.workload} n={t.n}: {t.reason}' for t in bad)}" if bad else ""
            took = time.monotonic() - began
            self._screen.say(f"round {number + 1}/{self._plan.rounds} {arm.name}: {took:.1f} s{tail}")

    def _arm(self, arm: Arm, number: int) -> None:
        cores = self._cores
        with started(arm, self._upstream.base_url, (MODEL,), core=cores.arm, first=cores.first) as running:
            self._add(start_trial(arm, running, number, imports=START in self._plan.special))
            warm_up(self._place("warm-up", 0), running, _WARM_UP_TAG)
            self._workloads(running, number)
        if arm.name == OURS and REPLAY in self._plan.special:
            place = self._place(REPLAY, 100)
            self._add(replay_trial(place, number, core=cores.arm, first=cores.first))

    def _workloads(self, running: RunningArm, number: int) -> None:
        """All that are for the arm. Of one that fails in a part, or is done no further, nothing more."""
        arm = running.arm
        planned = [(each, self._plan.steps(each)) for each in self._plan.workloads if each.is_for(arm)]
        parts: dict[tuple[str, int], Parts] = defaultdict(Parts)
        over: set[str] = set()
        for turn in turns(planned):
            name, step = turn.workload.name, turn.step
            if name in over:
                continue
            place = self._place(f"{arm.name} {name} n={step.n}", len(step.starts_s))
            try:
                trial = parts[name, step.n].do(place, running, turn, number=number)
            except _FAILURES as error:
                self._note_failure(arm, name, step.n, number, error)
                over |= {name} if turn.workload.sliced else set()
                continue
            if trial is None:
                continue
            self._add(self._gated(trial))
            if turn.workload.until_failing and trial.valid and not passing(trial):
                over.add(name)

    def _place(self, what: str, streams: int) -> Place:
        return Place(self._upstream, self._cores.instruments, self._screen.progress(what, streams), self._yardstick)

    def _gated(self, trial: Trial) -> Trial:
        """Not counted where client and upstream had failed without any arm."""
        for check in self.checks:
            if (check.workload, check.n) == (trial.workload, trial.n) and not check.valid and trial.valid:
                return msgspec.structs.replace(trial, valid=False, reason=f"calibration: {check.reason}")
        return trial

    def _note_failure(self, arm: Arm, workload: str, n: int, number: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"[:500]
        self._add(Trial(arm=arm.name, workload=workload, n=n, round=number, valid=False, reason=reason))

    def _add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.keep()


def make_environments(arms: Sequence[Arm], screen: Screen) -> list[str]:
    """Those that are missing; the names of arms whose environment could not be made, with why."""
    failed = []
    for arm in arms:
        if arm.environment and not environments.is_made(arm.environment):
            screen.say(f"making the environment of {arm.title} in build/bench/{arm.environment}")
            try:
                environments.make(arm.environment)
            except EnvironmentFailedError as error:
                failed.append(arm.name)
                screen.say(f"it could not be made: {error}")
    return failed


def told(arm: Arm) -> ArmTold:
    """The arm as the result tells of it."""
    pins = environments.versions(arm.environment) if arm.environment else {}
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    return ArmTold(name=arm.name, title=arm.title, requirements=requirements, versions=arm.versions())


def run(plan: Plan, out: Path, screen: Screen) -> Result:
    """All of it. What is measured is in the file after each trial; summary and report follow after each round.

    Raises:
        KeyboardInterrupt: as it was told; summary and report are of what there is by then.
    """
    cores = machine.cores(first=plan.first)
    make_environments(plan.arms, screen)
    with (
        on_core(cores.instruments),
        running_yardstick(cores.arm, first=cores.first) as yardstick,
        running_upstream(cpu=cores.instruments) as upstream,
    ):
        runner = Runner(plan, upstream, screen, cores, yardstick)
        runner.calibrate()
        result = Result(
            seed=SEED,
            git=machine.git(),
            env=machine.environment(cores),
            calibration=Calibrations(all(check.valid for check in runner.checks), runner.checks),
            arms=[told(arm) for arm in plan.arms],
        )
        runner.keep = partial(_keep, result, runner, out)
        try:
            for number in range(plan.rounds):
                runner.round(number)
                _sum_up(result, runner, out)
        except KeyboardInterrupt:
            _sum_up(result, runner, out)
            screen.say(f"interrupted; {len(runner.trials)} trials are in {out}")
            raise
    return result


def _keep(result: Result, runner: Runner, out: Path) -> None:
    result.trials = runner.trials
    save(result, out)


def _sum_up(result: Result, runner: Runner, out: Path) -> None:
    result.speed = runner.speed()
    result.trials = [*runner.trials, *derived(runner.trials[: runner.whole], result.speed)]
    result.summary = summarize(result.trials, seed=SEED, speed=result.speed)
    save(result, out)
    write_report(result, out.parent)


def plan_of(
    arms: str, workloads: str, rounds: int | None, *, full: bool, first: bool = False, streams: str = ""
) -> Plan:
    """What the options ask for. Raises ``click.UsageError`` for a name, or a number, that is none."""
    names = [name for name in workloads.split(",") if name]
    try:
        chosen = [find_arm(name) for name in arms.split(",") if name] or [arm for arm in ARMS if not arm.optional]
        found = selected(names, full=full)
        wanted = [int(number) for number in streams.split(",") if number]
    except (KeyError, ValueError) as error:
        raise click.UsageError(error.args[0]) from error
    special = [name for name in (START, REPLAY) if name in names or (full and not names)]
    rounds = rounds or (7 if full else 3)
    return Plan(arms=chosen, workloads=found, special=special, rounds=rounds, full=full, first=first, streams=wanted)


@click.command()
@click.option("--full", is_flag=True, help="All workloads, long, 7 rounds; hours.")
@click.option("--arms", default="", help="Names, with commas between; all but the optional ones by default.")
@click.option("--workloads", default="", help="Names, with commas between; those of the form by default.")
@click.option("--first", is_flag=True, help="Arms run before other processes too: for a machine that others use.")
@click.option("--streams", default="", help="Of a workload in steps, those of so many streams, with commas between.")
@click.option("--rounds", type=click.IntRange(1), help="3, or 7 in full.")
@click.option(
    "--out", default="build/bench/result.json", type=click.Path(path_type=Path), help="Where the result goes."
)
def main(full: bool, arms: str, workloads: str, first: bool, streams: str, rounds: int | None, out: Path) -> None:
    """Measure, and write result and report."""
    plan = plan_of(arms, workloads, rounds, full=full, first=first, streams=streams)
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever ends it ends its servers too, in the background as well
        signal.signal(number, signal.default_int_handler)
    result = run(plan, out, Screen())
    click.echo(f"{out}, {out.with_name('report.html')}")
    click.echo(table(result))


if __name__ == "__main__":
    main()
