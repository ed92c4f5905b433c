"""Several processes with one database."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from sqlalchemy import text

from server.store.database import Database
from server.store.history import count_messages
from server.store.migrations import MIGRATIONS

from .writer import SCOPE

PROCESSES = 3
TURNS = 20


@pytest.fixture(params=["sqlite", "postgresql"])
def bare_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        url: str = request.getfixturevalue("bare_postgres_url")
        return url
    return f"sqlite:///{tmp_path / 'lumos.db'}"


def write_from_many_processes(url: str) -> None:
    """Start the writers, let them go at the same moment, and wait for their good end."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.server.store.writer", url, f"writer{number}", str(TURNS)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for number in range(PROCESSES)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        for writer in writers:
            _, complaints = writer.communicate()
            assert (writer.returncode, complaints) == (0, "")


async def test_processes_that_start_at_once_migrate_once_and_lose_no_write(bare_url: str) -> None:
    await trio.to_thread.run_sync(write_from_many_processes, bare_url)
    database = Database.open(bare_url)
    versions = await database.read(lambda c: c.execute(text("SELECT version FROM schema_version")).scalars().all())
    assert versions == [migration.version for migration in MIGRATIONS]
    assert await database.read(count_messages, SCOPE, None) == 2 * PROCESSES * TURNS
    database.close()
