"""The one store of a simulated world: SQLite in memory, shared by all workers' lives, which it outlasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar, TypeVarTuple

from sqlalchemy import Connection, Engine

from server.store.connecting import driver_of
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.schema import schema_version
from server.store.transactions import Transactions

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Template(Database):
    """Migrated once in a process. All worlds use its engine, one after the other: SQL is compiled once."""

    def for_world(self) -> tuple[Engine, Transactions]:
        """The engine, with nothing in its tables, and its transactions, on one connection that stays."""
        with self._engine.connect() as c:
            connection = driver_of(c)
            connection.execute("PRAGMA foreign_keys = OFF")  # else it deletes row by row
            for table in _tables():
                connection.execute(f"DELETE FROM {table}")
            connection.execute("PRAGMA foreign_keys = ON")
        return self._engine, self._writing


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
        self._engine, self.transactions = _template().for_world()
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
        self._reading = self._writing = store.transactions
        self._store = store
        self.is_alive = is_alive

    @contextmanager
    def present(self, clean_up: Callable[[Connection], object]) -> Iterator[None]:
        """See ``Database.present``: here too only a server that is alone cleans up."""
        if not self._store.others_than(self):
            self._run(self._writing, clean_up)
        self._store.came(self)
        try:
            yield
        finally:
            self._store.left(self)

    def do(self, change: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """Make the change now, without a checkpoint."""
        return self._run(self._writing, change, *args)

    def close(self) -> None:
        """Nothing: the store outlasts it."""

    def _run(self, transactions: Transactions, function: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        if not self.is_alive():
            raise StoreUnavailableError("this process is dead")
        if self._store.away:
            raise StoreUnavailableError(f"{self.name}: the store is away")
        return super()._run(transactions, function, *args)


@cache
def _template() -> _Template:
    template = _Template.open("sqlite://", inline=True)
    assert isinstance(template, _Template)
    return template
