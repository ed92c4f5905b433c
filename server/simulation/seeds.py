"""Many worlds, over processes: which seeds fail, and what all of them had in them.

A process acts its worlds one after the other; none leaves anything to the next. What is told does not depend on how
many processes there are, but for the real time that it takes.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing import get_context

from .draw import draw
from .kinds import kinds_of
from .plan import Plan
from .run_plan import Outcome, simulate
from .world import Cast

WORLD_SECONDS = 60.0
"""Of CPU for one world, a hundred times what large ones take: then it is a loop that never ends."""

CHUNK = 20
"""Worlds that a process gets at once: a second or two."""


class EndlessWorldError(BaseException):
    """A world has had all the CPU that one may have; no ``except Exception`` gets it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is told of one world.

    Attributes:
        digest: SHA-256 of its trace.
        kinds: what happened in it how often, see ``kinds``.
    """

    seed: int
    violations: list[str]
    digest: str
    virtual_seconds: float
    cpu_seconds: float
    runs: int
    events: int
    kinds: Counter[str]


@dataclass(kw_only=True)
class Figures:
    """What is told of all of them.

    Attributes:
        real_seconds: on the wall.
        digest: of the digests of all, in their order.
    """

    failed: list[Verdict] = field(default_factory=list)
    worlds: int = 0
    processes: int = 1
    real_seconds: float = 0.0
    virtual_seconds: float = 0.0
    cpu_seconds: float = 0.0
    runs: int = 0
    events: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    digest: str = ""

    def add(self, verdict: Verdict) -> None:
        """Count it."""
        self.worlds += 1
        self.virtual_seconds += verdict.virtual_seconds
        self.cpu_seconds += verdict.cpu_seconds
        self.runs += verdict.runs
        self.events += verdict.events
        self.kinds += verdict.kinds
        self.digest = sha256(f"{self.digest}{verdict.digest}".encode()).hexdigest()
        if verdict.violations:
            self.failed.append(verdict)


def seeds_of(text: str) -> range:
    """``1000`` are the seeds from 0 to 999, ``5000-5999`` those.

    Raises:
        ValueError: it is neither, or there are none.
    """
    first, dash, last = text.partition("-")
    seeds = range(int(first), int(last) + 1) if dash else range(int(first))
    if not seeds:
        raise ValueError(f"there are no seeds in {text!r}")
    return seeds


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def judge_seeds(
    seeds: range, processes: int, failures: int, tell: Callable[[Figures], None] = lambda _: None
) -> Figures:
    """Act the worlds of the seeds, in their order, until so many have failed; ``tell`` hears how far it has come."""
    began = time.monotonic()
    figures = Figures(processes=processes)
    with closing(_here(seeds) if processes == 1 else _over_processes(seeds, processes)) as verdicts:
        for verdict in verdicts:
            figures.add(verdict)
            figures.real_seconds = time.monotonic() - began
            tell(figures)
            if len(figures.failed) >= failures:
                break
    return figures


def verdict_of(outcome: Outcome) -> Verdict:
    """What is told of it; the rest is much."""
    runs = outcome.observations.runs.values()
    return Verdict(
        seed=outcome.plan.seed,
        violations=outcome.violations,
        digest=sha256(outcome.trace.encode()).hexdigest(),
        virtual_seconds=outcome.virtual_seconds,
        cpu_seconds=outcome.real_seconds,
        runs=len(runs),
        events=sum(len(run.events) for run in runs),
        kinds=kinds_of(outcome.plan, outcome.trace),
    )


def simulate_within(plan: Plan, cast: Cast | None = None, cpu_seconds: float = WORLD_SECONDS) -> Outcome:
    """``simulate``, but a world that loops without ever asking trio is a violation too."""
    with _cpu_limit(cpu_seconds):
        return simulate(plan, cast)


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise EndlessWorldError(f"{seconds} s of CPU were not enough")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _here(seeds: Sequence[int]) -> Generator[Verdict, None, None]:
    for seed in seeds:
        yield verdict_of(simulate_within(draw(seed)))


def _over_processes(seeds: range, processes: int) -> Generator[Verdict, None, None]:
    context = get_context("spawn")  # a fork would have what this process has done before
    chunks = (seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK))
    executor = ProcessPoolExecutor(processes, context, initializer=_prepare)
    waiting: deque[Future[list[Verdict]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(executor.submit(_judge_chunk, chunk))
            if len(waiting) > 2 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _prepare() -> None:
    """What is loaded stays: the collector, which runs after each world, need not look at it each time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    simulate(draw(0))
    gc.collect()
    gc.freeze()


def _judge_chunk(seeds: Sequence[int]) -> list[Verdict]:
    return list(_here(seeds))
