"""What the journal costs on the way of a token: microseconds per event without it, with followers, and with it.

    .venv/bin/python -m benchmarks.journal_cost [--events 20000] [--rounds 7]

A run says one word after the other, a reader takes each as it comes. The arms take turns in one process: no follower,
one that does nothing (the fan-out alone), and the journal on an SQLite file. The first table is processor time of the
whole process, with all that the journal does in its worker thread; the second is ``RunLog.append`` alone, what a token
waits for.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click
import trio

from engine import BasicAgent, Emit, ModelRequest, RequestSentPiece, Run, RunLog, RunSpec, RunSupervisor, TextPiece
from engine.events import AgentStarted, TextDelta
from engine.memory import Owner
from server.journal import Journal
from server.log_followers import LogFollower, LogFollowers
from server.store.database import Database
from server.store.rows import Scope
from server.store.turns import begin_run

ARMS = ("none", "fan-out", "journal")
NOW = "2026-11-22T12:00:00.000000+00:00"


class Talker:
    """A model that says so many words, each when the reader has taken the one before."""

    name = "talker"

    def __init__(self, words: int) -> None:
        self.words = words

    async def stream(self, request: ModelRequest, emit: Emit) -> None:  # noqa: ARG002
        """Say them."""
        emit((RequestSentPiece(),))
        piece = (TextPiece("word "),)
        for _ in range(self.words):
            emit(piece)
            await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Nothing is open."""


class Idle:
    """Follows, and does nothing."""

    def follow(self, run: Run) -> None:
        """Do nothing."""

    def appended(self, log: RunLog) -> None:
        """Do nothing."""


async def read_run(spec: RunSpec, run_id: str, followers: tuple[LogFollower, ...]) -> int:
    """Run it with one reader; how many events came."""
    async with trio.open_nursery() as nursery:
        run = RunSupervisor(nursery, LogFollowers(*followers)).start(spec, run_id)
        after = 0
        with run.log.attached():
            while entries := await run.log.read(after):
                after = entries[-1].seq
    return after


async def measure_run(arm: str, words: int, database: Database, number: int) -> float:
    """Microseconds of processor time per event."""
    spec = BasicAgent(agent_id="a", provider=Talker(words), model="m").run_spec("hi")
    run_id = f"{arm}-{number}"
    scope = Scope("t", "u", "a")
    await database.write(begin_run, scope, Owner().session_id, run_id, None, NOW)
    journal = Journal(database)
    followers: dict[str, tuple[LogFollower, ...]] = {"none": (), "fan-out": (Idle(),), "journal": (journal,)}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.work)
        began = time.process_time_ns()
        events = await read_run(spec, run_id, followers[arm])
        await journal.flush(30)
        took = time.process_time_ns() - began
        nursery.cancel_scope.cancel()
    return took / 1000 / events


def measure_append(arm: str, count: int, database: Database) -> float:
    """Microseconds of one ``append``, with nobody reading or writing meanwhile."""
    log = RunLog("r" * 22)
    log.append(AgentStarted("a", log.run_id, NOW))
    told: dict[str, Callable[[], LogFollower | None]] = {
        "none": lambda: None,
        "fan-out": Idle,
        "journal": lambda: Journal(database),
    }
    follower = told[arm]()
    if follower is not None:
        run = BasicAgent(agent_id="a", provider=Talker(1), model="m").run_spec("hi")
        copied = Run(log.run_id, run, LogFollowers(follower))
        log.on_append = copied.log.on_append
    event = TextDelta("word ", "step-1")
    began = time.perf_counter_ns()
    for _ in range(count):
        log.append(event)
    return (time.perf_counter_ns() - began) / 1000 / count


@contextmanager
def open_database() -> Iterator[Database]:
    """A file for this measurement."""
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(Database.open(f"sqlite:///{Path(directory) / 'lumos.db'}")) as database,
    ):
        yield database


async def measure(events: int, rounds: int) -> None:
    """Measure, the arms in turn, and print."""
    runs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    appends: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with open_database() as database:
        for number in range(rounds):
            for arm in ARMS:
                runs[arm].append(await measure_run(arm, events, database, number))
                appends[arm].append(measure_append(arm, events, database))
    click.echo(f"{platform.machine()}, Python {sys.version.split()[0]}, trio {trio.__version__}")
    click.echo(f"{events} events, {rounds} rounds, median (least)")
    for title, arms in (("whole run, processor time", runs), ("append alone, wall clock", appends)):
        click.echo(f"\n{title}, µs per event")
        for arm in ARMS:
            more = statistics.median(arms[arm]) - statistics.median(arms["none"])
            click.echo(f"  {arm:8} {statistics.median(arms[arm]):7.2f} ({min(arms[arm]):.2f})  {more:+.2f}")


@click.command()
@click.option("--events", default=20_000, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(events: int, rounds: int) -> None:
    """What the journal costs for each event."""
    trio.run(measure, events, rounds)


if __name__ == "__main__":
    main()
