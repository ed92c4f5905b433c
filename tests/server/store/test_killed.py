"""A process that is killed while it writes: each turn is there whole, or only begun, or not at all."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from server.store.database import Database
from server.store.interrupted import interrupt_runs

LATER = "2026-11-23T12:00:00.000000+00:00"
POINTS_OF_FIRST_OPENING = 140
POINTS_OF_TWO_TURNS = 61
RANDOM_KILLS = 20


class Doomed:
    """The process of ``doomed.py``, and the writer that it has forked."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.store.doomed", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def live(self, points: int, *, waits: bool) -> str:
        """Let a writer reach so many points, then kill it; the points it told.

        If it ``waits``, it is killed at the last of them; else it runs on meanwhile, and death meets it anywhere.
        """
        self._stdin.write(b"w" if waits else b"r")
        writer = int(self._line())
        told = self._stdout.read(1).decode()
        for _ in range(points - 1):
            if waits:
                self._stdin.write(b".")
            told += self._stdout.read(1).decode()
        os.kill(writer, signal.SIGKILL)
        told += self._line()
        assert told.endswith("dead")
        return told.removesuffix("dead")

    def close(self) -> None:
        self._stdin.close()
        self._process.wait()
        self._stdout.close()

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            line += self._stdout.read(1)
        return line.decode().strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lumos.db"


@pytest.fixture
def doomed(path: Path) -> Iterator[Doomed]:
    process = Doomed(f"sqlite:///{path}")
    yield process
    process.close()


def check(path: Path) -> tuple[int, int]:
    """Assert that nothing is broken, half there or there twice; how many runs are under way, and how many are done."""
    with closing(sqlite3.connect(path)) as c:
        assert c.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert c.execute("PRAGMA foreign_key_check").fetchall() == []
        if c.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,):
            return 0, 0
        c.execute("INSERT INTO memory_index (memory_index) VALUES ('integrity-check')")
        if c.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'memories_indexed'").fetchone() == (1,):
            matching = "SELECT rowid FROM memory_index WHERE memory_index MATCH 'terms : question' ORDER BY rowid"
            indexed = "SELECT number FROM memories WHERE number <= (SELECT upto FROM memories_indexed) ORDER BY number"
            assert c.execute(matching).fetchall() == c.execute(indexed).fetchall()
        ran = c.execute(
            """
            SELECT status,
                (SELECT group_concat(role || ' ' || content, '; ') FROM messages WHERE messages.run_id = runs.run_id),
                (SELECT group_concat(text) FROM memories WHERE memory_id = runs.run_id),
                run_id
            FROM runs
            """
        ).fetchall()
        assert c.execute("SELECT count(*) FROM messages").fetchone() == (
            sum(2 if run[0] == "done" else 1 for run in ran),
        )
    for status, messages, memory, run_id in ran:
        question = f"question {run_id}"
        assert memory == (None if status == "running" else question)
        whole = f"user {question}" + (f"; assistant answer {run_id}" if status == "done" else "")
        assert (status in ("running", "done"), messages) == (True, whole)
    statuses = [run[0] for run in ran]
    return statuses.count("running"), statuses.count("done")


async def assert_opens_and_interrupts(path: Path, running: int) -> None:
    database = Database.open(f"sqlite:///{path}")
    assert await database.write(interrupt_runs, LATER) == running
    assert await database.write(interrupt_runs, LATER) == 0
    database.close()
    with closing(sqlite3.connect(path)) as c:
        forgotten = c.execute("SELECT run_id FROM runs WHERE run_id NOT IN (SELECT memory_id FROM memories)").fetchall()
    assert forgotten == []


async def test_death_at_any_point_leaves_the_database_whole(path: Path, doomed: Doomed) -> None:
    saved = 0
    for points in (*range(1, POINTS_OF_FIRST_OPENING), *range(1, POINTS_OF_TWO_TURNS)):
        told = doomed.live(points, waits=True)
        assert len(told) == points
        saved += told.count("s")
        running, done = check(path)
        assert done == saved
    assert saved > POINTS_OF_TWO_TURNS // 3
    assert running > POINTS_OF_TWO_TURNS // 4
    await assert_opens_and_interrupts(path, running)


async def test_death_at_random_moments_leaves_the_database_whole(path: Path, doomed: Doomed) -> None:
    chance = random.Random(4)
    saved = 0
    for _ in range(RANDOM_KILLS):
        saved += doomed.live(chance.randrange(1, 400), waits=False).count("s")
        running, done = check(path)
        # The last turn may have been committed and not told.
        assert saved <= done <= saved + RANDOM_KILLS
    assert saved
    await assert_opens_and_interrupts(path, running)
