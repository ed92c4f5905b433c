"""From a database URL to an engine: drivers, pragmas, time limits. SQLite and PostgreSQL, nothing else."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool, StaticPool

from .errors import DatabaseError

CONNECT_SECONDS = 5
BUSY_RETRY_SECONDS = 0.01
READERS = 8
SQLITE_WRITERS = 1
POSTGRESQL_WRITERS = 8

WAL_PAGES = 4000
"""Of SQLite's log, 16 MiB: a change that finds more takes it over into the file itself, and waits for the disk."""

_WRITES = "lumos_writes"


def parse_url(text: str) -> URL:
    """The URL with the driver that we use.

    Raises:
        DatabaseError: it is no URL, or one of another database; the text does not repeat it.
    """
    try:
        url = make_url(text)
    except Exception:  # noqa: BLE001 - whatever it says, it may hold the password
        raise DatabaseError(
            "this is no database URL: sqlite:///lumos.db, sqlite:////absolute/lumos.db and"
            " postgresql://user@host/name are some"
        ) from None
    match url.drivername:
        case "sqlite" | "sqlite+pysqlite":
            return url.set(drivername="sqlite+pysqlite")
        case "postgres" | "postgresql" | "postgresql+psycopg":
            if importlib.util.find_spec("psycopg") is None:
                raise DatabaseError("PostgreSQL needs psycopg: pip install 'lumos-stream[postgres]'")
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise DatabaseError(f"{other} is not supported: the database is sqlite:///… or postgresql://…")


def shown(url: URL) -> str:
    """The URL for people and logs: without password and options."""
    return url.set(password=None, query={}).render_as_string().replace("+psycopg:", ":").replace("+pysqlite:", ":")


def without_secrets(url: URL, text: str) -> str:
    """The text with the URL's password struck out, should a driver have repeated it."""
    options = (value for name, value in url.query.items() if "pass" in name.lower())
    for secret in (str(url.password or ""), *map(str, options)):
        text = text.replace(secret, "***") if secret else text
    return text


def is_in_memory(url: URL) -> bool:
    """Whether the database is gone with its connection."""
    named = str(url.database or ":memory:")
    return url.drivername.startswith("sqlite") and (
        named == ":memory:" or "mode=memory" in named or url.query.get("mode") == "memory"
    )


def connect_sqlite(url: URL, busy_timeout: float) -> Engine:
    """An engine for a file, which is made when there is none (readable by its owner only), or for memory.

    Raises:
        DatabaseError: there is no such folder, or it may not be written.
    """
    size = READERS + SQLITE_WRITERS + 1  # and `Database.keep_tidy`
    options: dict[str, Any] = {"poolclass": QueuePool, "pool_size": size, "max_overflow": 0}
    if is_in_memory(url):
        options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    elif "uri" not in url.query:
        _make_file(Path(str(url.database)))
    engine = create_engine(url, hide_parameters=True, **options)

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        # Python's sqlite3 would begin transactions itself, late and never IMMEDIATE:
        # https://docs.sqlalchemy.org/en/21/dialects/sqlite.html#sqlite-transactions
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {round(busy_timeout * 1000)}")
        _use_wal(connection, busy_timeout)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if driver_of(connection).in_transaction:
            return  # a kept connection's (``transactions``)
        # A transaction that reads before it writes would fail at its first write if another wrote in between.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: sqlite3.Connection, busy_timeout: float) -> None:
    """Have the file in WAL mode. SQLite refuses that at once while another writes in a new file."""
    give_up_at = time.monotonic() + busy_timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
            time.sleep(BUSY_RETRY_SECONDS)
        else:
            return


def connect_postgresql(url: URL, statement_timeout: float) -> Engine:
    """An engine through psycopg; connections that have died are found out before they are used."""
    engine = create_engine(
        url,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=READERS + POSTGRESQL_WRITERS,
        max_overflow=0,
        connect_args={"connect_timeout": CONNECT_SECONDS, "client_encoding": "utf8"},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: ConnectionPoolEntry) -> None:
        # Not as a start-up option: connection poolers refuse those. In a transaction, a rollback would undo it.
        connection.autocommit = True
        connection.execute(f"SET statement_timeout = {round(statement_timeout * 1000)}")
        connection.autocommit = False

    return engine


def driver_of(c: Connection) -> sqlite3.Connection:
    """SQLite's own connection."""
    connection: Any = c.connection.dbapi_connection
    return connection  # type: ignore[no-any-return]


def for_writing(engine: Engine) -> Engine:
    """The same engine and pool; its transactions take SQLite's write lock when they begin."""
    return engine.execution_options(**{_WRITES: True})


def _make_file(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise DatabaseError(f"{path} cannot be opened: {error.strerror}") from error
