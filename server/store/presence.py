"""Servers of one database know of each other: the first may clean up after those that died, a later one may not.

Each server holds a shared lock for as long as it lives, and the system gives it back when it dies, however it dies. Who
can take the lock for itself alone at its start is alone.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, text

LOCK_NUMBER = 0x6C756D6F73
"""PostgreSQL's advisory locks are numbers: this one spells "lumos"."""

LOCK_SUFFIX = ".servers"


@contextmanager
def present_beside(database: Path, clean_up: Callable[[], None]) -> Iterator[None]:
    """While the block runs, a server of this SQLite file is there; the first one cleans up before the next can come.

    The lock is one of a file beside it: SQLite's own are of another kind, and on the database itself they would be lost
    as soon as any descriptor of it is closed (https://www.sqlite.org/howtocorrupt.html, section 2.2).
    """
    with database.with_name(database.name + LOCK_SUFFIX).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            clean_up()
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for one that cleans up
        yield


@contextmanager
def present_in(engine: Engine, clean_up: Callable[[], None]) -> Iterator[None]:
    """The same for a PostgreSQL database. A connection that breaks loses the lock: its server no longer counts."""
    with engine.connect() as c:
        c.detach()  # it keeps the lock until it is closed, not until it is back in the pool
        if c.execute(text("SELECT pg_try_advisory_lock(:n)"), {"n": LOCK_NUMBER}).scalar_one():
            clean_up()
            _run(c, "SELECT pg_advisory_lock_shared(:n)")
            _run(c, "SELECT pg_advisory_unlock(:n)")
        else:
            _run(c, "SELECT pg_advisory_lock_shared(:n)")
        c.commit()
        yield


def _run(c: Connection, statement: str) -> None:
    c.execute(text(statement), {"n": LOCK_NUMBER})
