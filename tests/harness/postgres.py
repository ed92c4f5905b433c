"""A PostgreSQL cluster of our own for the tests, and databases of both kinds as fixtures.

``tests/server/conftest.py`` imports the fixtures; a folder elsewhere imports them into its own ``conftest.py`` (which
then starts a cluster of its own). There is one cluster for a session; each test has a copy of a template, or one
emptied again.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from server.store.database import Database
from server.store.schema import ALL_TABLES, schema_version

_USER = "lumos"
_TEMPLATE = "lumos_template"
_FASTER_BUT_FORGETFUL = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=32MB")


class Cluster:
    """A running PostgreSQL server on ``127.0.0.1``; whoever starts it stops it (``running_cluster``)."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._numbers = itertools.count(1)
        self._emptied: list[str] = []

    def url(self, database: str) -> str:
        """Where a database of it is."""
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{database}"

    def create_database(self, template: str = "template0") -> str:
        """A new database, as a copy of another one; its name."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop_database(self, name: str) -> None:
        """Delete it, whoever is connected."""
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def lend_database(self) -> str:
        """A database with our tables, all empty: one that was given back, or a copy of the template."""
        return self._emptied.pop() if self._emptied else self.create_database(_TEMPLATE)

    def take_back_database(self, name: str) -> None:
        """Throw out who is still connected, and empty the tables: ten times faster than another copy."""
        tables = ", ".join(table.name for table in ALL_TABLES if table is not schema_version)
        with psycopg.connect(self.url(name), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            connection.execute(f"TRUNCATE {tables} RESTART IDENTITY".encode())
        self._emptied.append(name)

    def execute(self, statement: str) -> None:
        """Run a statement outside every test's database."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


def find_programs() -> Path:
    """The folder of initdb and pg_ctl, the newest version's.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
    """
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda found: float(found.parts[-3]), reverse=True
    )
    named = shutil.which("initdb")
    found = [*debian, *([Path(named).resolve()] if named else [])]
    if not found:
        raise FileNotFoundError("the store's tests need PostgreSQL: apt-get install postgresql (.ci/run does so)")
    return found[0].parent


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A new cluster in a temporary folder, on a free port; stopped and deleted at the end."""
    programs = find_programs()
    folder = Path(tempfile.mkdtemp(prefix="lumos-postgres-"))
    data, log = folder / "data", folder / "log"
    log.touch()
    if os.geteuid() == 0:
        for path in (folder, log):
            shutil.chown(path, "postgres", "postgres")
    try:
        locale = ("--encoding=UTF8", "--locale=C")
        _run(log, programs / "initdb", "-D", data, "-U", _USER, "-A", "trust", "--no-sync", *locale)
        port = _free_port()
        settings = (f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}")
        options = " ".join(f"-c {setting}" for setting in (*settings, *_FASTER_BUT_FORGETFUL))
        _run(log, programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield Cluster(port)
        finally:
            _run(log, programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _run(log: Path, *command: str | Path) -> None:
    """Run a program of PostgreSQL, which refuses to be root; what it says goes to the log."""
    as_root = os.geteuid() == 0
    # Not to a pipe: the server that pg_ctl starts would hold it open.
    with log.open("ab") as output:
        done = subprocess.run(
            command,
            user="postgres" if as_root else None,
            group="postgres" if as_root else None,
            extra_groups=[] if as_root else None,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}:\n{log.read_text(errors='replace')[-4000:]}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Cluster]:
    """A cluster for the whole session, with a template that has our tables."""
    with running_cluster() as cluster:
        cluster.execute(f"CREATE DATABASE {_TEMPLATE}")
        Database.open(cluster.url(_TEMPLATE)).close()
        yield cluster


@pytest.fixture
def postgres_url(postgres_cluster: Cluster) -> Iterator[str]:
    """A PostgreSQL database with our tables, empty; a test that changes the tables takes ``bare_postgres_url``."""
    name = postgres_cluster.lend_database()
    yield postgres_cluster.url(name)
    postgres_cluster.take_back_database(name)


@pytest.fixture
def bare_postgres_url(postgres_cluster: Cluster) -> Iterator[str]:
    """A fresh PostgreSQL database without any table."""
    name = postgres_cluster.create_database()
    yield postgres_cluster.url(name)
    postgres_cluster.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a fresh database is, of one kind and then of the other; with our tables once it is opened."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return f"sqlite:///{tmp_path / 'lumos.db'}"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh database, of one kind and then of the other."""
    opened = Database.open(database_url)
    yield opened
    opened.close()
