"""Servers of one database: the first cleans up, a later one does not, and who dies is no longer there."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing

import psycopg
from sqlalchemy import Connection

from server.store.database import Database
from server.store.presence import LOCK_NUMBER

ANOTHER_SERVER = """
import sys
from server.store.database import Database
with Database.open(sys.argv[1]).present(lambda c: print("alone", flush=True)):
    print("present", flush=True)
    sys.stdin.read()
"""


def test_only_who_is_alone_cleans_up(database_url: str) -> None:
    cleaned: list[str] = []

    def noting(who: str) -> Callable[[Connection], None]:
        return lambda c: cleaned.append(who)

    with closing(Database.open(database_url)) as one, closing(Database.open(database_url)) as two:
        with one.present(noting("one")):
            with two.present(noting("two")):
                assert cleaned == ["one"]
            with two.present(noting("two")):
                assert cleaned == ["one"]
        wait_until_nobody_is_there(database_url)
        with two.present(noting("two")):
            assert cleaned == ["one", "two"]


def test_who_was_killed_is_no_longer_there(database_url: str) -> None:
    cleaned: list[str] = []
    with closing(Database.open(database_url)) as database:
        command = [sys.executable, "-c", ANOTHER_SERVER, database_url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert [other.stdout.readline(), other.stdout.readline()] == ["alone\n", "present\n"]
            with database.present(lambda c: cleaned.append("a second one")):
                pass
            other.send_signal(signal.SIGKILL)
        wait_until_nobody_is_there(database_url)
        with database.present(lambda c: cleaned.append("a survivor")):
            pass
    assert cleaned == ["a survivor"]


def wait_until_nobody_is_there(database_url: str) -> None:
    """PostgreSQL's process for a client ends a moment after it; a system's file lock ends with its holder."""
    if database_url.startswith("postgresql"):
        with psycopg.connect(database_url, autocommit=True, options="-c lock_timeout=60s") as c:
            c.execute("SELECT pg_advisory_lock(%s)", [LOCK_NUMBER])
            c.execute("SELECT pg_advisory_unlock(%s)", [LOCK_NUMBER])
