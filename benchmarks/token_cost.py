"""What an event costs a server in CPU, arm beside arm, and where Lumos spends it.

    python -m benchmarks.token_cost [--arms lumos,floor,...] [--work flood,paced,...] [--rounds 5] [--before CHECKOUT]
    python -m benchmarks.token_cost --profile paced

Servers run pinned to core 1, upstream and client to core 0. All arms are up during all rounds and take turns. Shown are
the least of the rounds (others' work on the machine only ever adds), in microseconds of CPU: ``event`` is all of it by
events delivered, requests included; ``steady`` is that of the time in which all streams were open; ``at full speed`` is
``event`` with the core's own speed taken out (``bench.yardstick``), the median of the rounds.
``--profile`` samples Lumos's main thread each millisecond of CPU and prints lines by their share.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeAlias

import click
import msgspec

from benchmarks.bench import arms as arms_module
from benchmarks.bench import launching
from benchmarks.bench.arms import Arm, RunningArm, find_arm, started
from benchmarks.bench.drive import ROOT, RunningUpstream, run_client, running_upstream
from benchmarks.bench.job import TAG, Job, Progress
from benchmarks.bench.launching import Launch, Order
from benchmarks.bench.trial import during
from benchmarks.bench.turns import FIRST_TAG_STEP
from benchmarks.bench.yardstick import Yardstick, running_yardstick

SERVER_CORE, OTHER_CORE = 1, 0


class Work(msgspec.Struct, frozen=True):
    """Streams of one answer, begun ``spread_s`` apart in all."""

    model: str
    streams: int
    spread_s: float = 0.0


WORK = {
    "one": Work("one", 100, 1.0),
    "flood": Work("flood-200", 50),
    "flood-long": Work("flood-10000", 5),
    "paced": Work("paced-20x120", 120, 3.0),
    "paced-1": Work("paced-20x100", 1),
    "short": Work("paced-20x100", 60, 3.0),
    "brief": Work("paced-20x40", 100, 3.0),
    "long": Work("paced-20x1000", 2),
    "steady": Work("paced-10x80", 60, 3.0),
    "gpt4o": Work("gpt4o", 160, 2.0),
}
_first_tags = itertools.count(0, FIRST_TAG_STEP)
MODELS = tuple(dict.fromkeys(work.model for work in WORK.values()))


class Figures(msgspec.Struct, frozen=True):
    """Of one round."""

    event_us: float
    steady_us: float
    lateness_p99_ms: float
    event_pieces: float = float("nan")
    """By the microseconds of the yardstick's piece at the time."""


def job_for(running: RunningArm, work: Work) -> Job:
    """The client's job: each stream is a conversation of its own, as in the benchmark."""
    request = running.arm.request(work.model, f"bench-{TAG}:{work.model}", headers=running.headers, session=f"s-{TAG}")
    return Job(
        host="127.0.0.1",
        port=running.process.port,
        path=request.path,
        headers=dict(request.headers),
        body=request.body,
        starts_s=[number * work.spread_s / work.streams for number in range(work.streams)],
        first_tag=next(_first_tags),
    )


def one_round(
    running: RunningArm,
    work: Work,
    upstream: RunningUpstream,
    on_full: Callable[[], object] | None = None,
    yardstick: Yardstick | None = None,
) -> Figures:
    """Have an arm do the work; ``on_full`` is called once all streams are open. Raises RuntimeError if one failed."""
    upstream.reset()
    return measured(running, work, on_full, yardstick)


def measured(
    running: RunningArm,
    work: Work,
    on_full: Callable[[], object] | None = None,
    yardstick: Yardstick | None = None,
) -> Figures:
    """The same for who has reset the upstream: other arms may be at work."""
    seen: list[tuple[Progress, float]] = []
    process = running.process

    def note(progress: Progress) -> None:
        nonlocal on_full
        seen.append((progress, process.cpu_seconds()))
        if on_full is not None and progress.open == work.streams and progress.events:
            on_full()
            on_full = None

    before = process.cpu_seconds()
    outcome = run_client(job_for(running, work), cpu=OTHER_CORE, on_progress=note)
    spent = process.cpu_seconds() - before
    bad = [stream for stream in outcome.streams if not stream.exact]
    if bad:
        raise RuntimeError(f"{running.arm.name}: {len(bad)} streams failed: {bad[0]}")
    full = [(p.events, cpu) for p, cpu in seen if p.open == work.streams]
    steady = float("nan")
    if len(full) > 2:
        (first, cpu_first), (last, cpu_last) = full[0], full[-1]
        steady = (cpu_last - cpu_first) / (last - first) * 1e6
    event_us = spent / outcome.events * 1e6
    piece_us = during(outcome, yardstick.pieces()).mean_us() if yardstick else None
    late_ms = (outcome.lateness.percentile(99) or 0) / 1e6
    return Figures(event_us, steady, late_ms, event_us / piece_us if piece_us else float("nan"))


def compare(names: Sequence[str], works: Sequence[str], rounds: int, before: Path | None) -> None:
    """Print a table of the arms; of Lumos as it is in the checkout ``before``, too."""
    with (
        running_yardstick(SERVER_CORE) as yardstick,
        running_upstream(cpu=OTHER_CORE) as upstream,
        ExitStack() as stack,
    ):
        running = [
            stack.enter_context(started(find_arm(name), upstream.base_url, MODELS, core=SERVER_CORE)) for name in names
        ]
        if before is not None:
            with code_of(before):
                old = stack.enter_context(started(find_arm("lumos"), upstream.base_url, MODELS, core=SERVER_CORE))
            arm = msgspec.structs.replace(old.arm, name="lumos-before")
            running.append(msgspec.structs.replace(old, arm=arm))
        for one in running:
            one_round(one, WORK["flood"], upstream)
        for name in works:
            found: dict[str, list[Figures]] = {one.arm.name: [] for one in running}
            for number in range(rounds):
                turn = number % len(running)
                for one in running[turn:] + running[:turn]:
                    try:
                        found[one.arm.name].append(one_round(one, WORK[name], upstream, yardstick=yardstick))
                    except RuntimeError as failure:
                        print(str(failure)[:300])
            speed = yardstick.pieces().speed() if yardstick else None
            _tell(name, found, speed.fast_us if speed else float("nan"))


def _tell(work: str, found: dict[str, list[Figures]], fast_us: float) -> None:
    ours = _least(next(iter(found.values())))
    for arm, figures in ((arm, figures) for arm, figures in found.items() if figures):
        least = _least(figures)
        print(
            f"{work:11} {arm:16} event {least.event_us:7.1f} steady {least.steady_us:7.1f} "
            f"late p99 {least.lateness_p99_ms:7.1f} ms   ours/it {ours.event_us / least.event_us:5.2f} "
            f"steady {ours.steady_us / least.steady_us:5.2f}   "
            f"at full speed {median(each.event_pieces for each in figures) * fast_us:7.1f}",
            flush=True,
        )


def _least(figures: Sequence[Figures]) -> Figures:
    return Figures(
        min(one.event_us for one in figures),
        min(one.steady_us for one in figures),
        min(one.lateness_p99_ms for one in figures),
    )


_SITE = """
import signal, os, sys, atexit
if os.environ.get("LUMOS_SAMPLES"):
    seen = {}
    def take(_number, frame):
        stack = []
        while frame is not None:
            stack.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno))
            frame = frame.f_back
        key = tuple(stack)
        seen[key] = seen.get(key, 0) + 1
    def start(_number, _frame):
        seen.clear()
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    def stop(_number, _frame):
        signal.setitimer(signal.ITIMER_PROF, 0)
        with open(os.environ["LUMOS_SAMPLES"] + ".new", "w") as out:
            out.write(repr(list(seen.items())))
        os.rename(os.environ["LUMOS_SAMPLES"] + ".new", os.environ["LUMOS_SAMPLES"])
    signal.signal(signal.SIGPROF, take)
    signal.signal(signal.SIGUSR1, start)
    signal.signal(signal.SIGUSR2, stop)
"""


@contextmanager
def code_of(checkout: Path) -> Iterator[None]:
    """Lumos arms started in the block are those of that checkout, with the keys that it makes."""
    ours = launching.ROOT  # type: ignore[attr-defined]
    launching.ROOT = checkout  # type: ignore[attr-defined]
    try:
        yield
    finally:
        launching.ROOT = ours  # type: ignore[attr-defined]


@contextmanager
def _launching(more: Mapping[str, str]) -> Iterator[None]:
    """Arms started in the block see these variables too."""
    plain = arms_module._launch

    def launch(arm: Arm, order: Order) -> Launch:
        made = plain(arm, order)
        return msgspec.structs.replace(made, environment={**made.environment, **more})

    arms_module._launch = launch
    try:
        yield
    finally:
        arms_module._launch = plain


@contextmanager
def _sampling() -> Iterator[Path]:
    """Lumos arms started in the block can be sampled (SIGUSR1 begins, SIGUSR2 writes the file)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(_SITE)
        with _launching({"PYTHONPATH": f"{folder}:{ROOT}", "LUMOS_SAMPLES": str(folder / "samples")}):
            yield folder / "samples"


Samples: TypeAlias = list[tuple[tuple[tuple[str, str, int], ...], int]]
"""Stacks, the innermost frame first, and how often each was seen."""


def profile(name: str, work: str) -> None:
    """Print where the arm's time goes."""
    arm = find_arm(name)
    with (
        _sampling() as file,
        running_upstream(cpu=OTHER_CORE) as upstream,
        started(arm, upstream.base_url, MODELS, core=SERVER_CORE) as running,
    ):
        one_round(running, WORK["flood"], upstream)
        begin = partial(os.kill, running.process.pid, signal.SIGUSR1)
        if WORK[work].model.startswith("flood"):  # over before the client tells for the first time
            begin()
            cost = one_round(running, WORK[work], upstream).event_us
        else:
            cost = one_round(running, WORK[work], upstream, begin).steady_us
        os.kill(running.process.pid, signal.SIGUSR2)
        while not file.exists():
            time.sleep(0.05)
        samples: Samples = eval(file.read_text())
    _print_profile(samples, cost)


def _print_profile(samples: Samples, event_us: float) -> None:
    total = sum(count for _, count in samples)
    own: Counter[tuple[object, ...]] = Counter()
    line: Counter[tuple[object, ...]] = Counter()
    within: Counter[tuple[object, ...]] = Counter()
    for stack, count in samples:
        own[stack[0][:2]] += count
        line[stack[0]] += count
        for place in {frame[:2] for frame in stack}:
            within[place] += count
    print(f"{total} samples, {event_us:.1f} us an event")
    for title, counter in (("own time", own), ("with what it calls", within), ("lines", line)):
        print(f"--- {title}")
        for where, count in counter.most_common(40):
            name = "/".join(str(where[0]).split("/")[-3:])
            print(f"{100 * count / total:5.1f} % {event_us * count / total:6.2f} us  {name} {where[1:]}")


@click.command()
@click.option("--arms", default="lumos,floor,fastapi-aiohttp,fastapi-httpx,fastapi-openai")
@click.option("--work", default="flood,paced,gpt4o")
@click.option("--rounds", default=5)
@click.option("--profile", "profiled", default=None, help="The work to profile instead.")
@click.option("--before", type=click.Path(path_type=Path), default=None, help="A checkout to compare Lumos with.")
def main(arms: str, work: str, rounds: int, profiled: str | None, before: Path | None) -> None:
    """Measure."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if profiled:
        profile(arms.partition(",")[0], profiled)
    else:
        compare(arms.split(","), work.split(","), rounds, before)


if __name__ == "__main__":
    main()
