"""The one store of a simulated world: SQLite in memory, shared by all workers' lives, which it outlasts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from typing import TypeVar, TypeVarTuple, cast

from sqlalchemy import Connection, Engine

from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.schema import schema_version

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Template(Database):
    """Migrated once in a process. All worlds use its engine, one after the other: SQL is compiled once."""

    def for_world(self) -> tuple[Engine, Connection, Connection]:
        """The engine, with nothing in its tables, and a connection to read and one to write with.

        Below them is one connection of SQLite's, so that it keeps what it has prepared.
        """
        reading, writing = self._connections
        connection = cast(sqlite3.Connection, reading.connection.dbapi_connection)
        connection.execute("PRAGMA foreign_keys = OFF")  # else it deletes row by row
        for table in _tables():
            connection.execute(f"DELETE FROM {table}")
        connection.execute("PRAGMA foreign_keys = ON")
        return self._engine, reading, writing

    @cached_property
    def _connections(self) -> tuple[Connection, Connection]:
        return self._engine.connect(), self._writing_engine.connect()


@cache
def _tables() -> list[str]:
    """What a world writes to; and where SQLite counts."""
    return [table.name for table in schema_version.metadata.sorted_tables if table is not schema_version] + [
        "sqlite_sequence"
    ]


class SimulatedStore:
    """What all workers write to. One exists at a time.

    Attributes:
        away: whether it fails whatever it is asked.
    """

    def __init__(self) -> None:
        self.away = False
        self._engine, self.reading, self.writing = _template().for_world()
        self._present: list[WorkerDatabase] = []
        self.direct = WorkerDatabase(self, self._engine, lambda: True)

    def handle(self, is_alive: Callable[[], bool]) -> WorkerDatabase:
        """For one life of a worker; it works until that is over."""
        return WorkerDatabase(self, self._engine, is_alive)

    def others_than(self, handle: WorkerDatabase) -> int:
        """How many other servers there are; those that died are none."""
        return sum(1 for other in self._present if other is not handle and other.is_alive())

    def came(self, handle: WorkerDatabase) -> None:
        """A server is there."""
        self._present.append(handle)

    def left(self, handle: WorkerDatabase) -> None:
        """It has gone."""
        self._present.remove(handle)


class WorkerDatabase(Database):
    """A worker's access to the store, in the calling task and without virtual time. A dead one changes nothing."""

    def __init__(self, store: SimulatedStore, engine: Engine, is_alive: Callable[[], bool]) -> None:
        super().__init__(engine.url, engine, inline=True)
        self._store = store
        self.is_alive = is_alive

    @contextmanager
    def present(self, clean_up: Callable[[Connection], object]) -> Iterator[None]:
        """See ``Database.present``: here too only a server that is alone cleans up."""
        if not self._store.others_than(self):
            self._run(self._writing_engine, clean_up)
        self._store.came(self)
        try:
            yield
        finally:
            self._store.left(self)

    def do(self, change: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """Make the change now, without a checkpoint."""
        return self._run(self._writing_engine, change, *args)

    def close(self) -> None:
        """Nothing: the store outlasts it."""

    def _connected(self, engine: Engine) -> AbstractContextManager[Connection]:
        """One of the store's two, which stay: nobody else asks meanwhile."""
        return nullcontext(self._store.writing if engine is self._writing_engine else self._store.reading)

    def _run(self, engine: Engine, function: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        if not self.is_alive():
            raise StoreUnavailableError("this process is dead")
        if self._store.away:
            raise StoreUnavailableError(f"{self.name}: the store is away")
        return super()._run(engine, function, *args)


@cache
def _template() -> _Template:
    template = _Template.open("sqlite://", inline=True)
    assert isinstance(template, _Template)
    return template
