"""Statements of every run's start and end: written in SQLAlchemy's terms, compiled once, then given to the driver.

Building a statement and its cache key anew costs 60 µs each time, executing one that is built 17 µs more than SQLite's
own 2 µs, and a start has a dozen. On PostgreSQL, where the network costs more than that, SQLAlchemy executes them.

Values are those that the database takes (``schema.storable_values``, ``schema.json_text``), and so are what is found: a
start hands the same few texts to all of its statements, and has them looked at once.

What a statement says of its own accord, ``constant`` writes into its text: SQLite plans a statement anew, for 40 to 70
µs, whenever a value was bound that might decide whether a partial index serves (https://www.sqlite.org/c3ref/prepare.html).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnClause,
    Connection,
    Delete,
    Dialect,
    Insert,
    Select,
    Text,
    Update,
    bindparam,
    literal_column,
    text,
)
from sqlalchemy.dialects import sqlite

from .connecting import driver_of
from .schema import JsonText

Values: TypeAlias = Mapping[str, Any]
Row: TypeAlias = Sequence[Any]
Statement: TypeAlias = Select[Any] | Insert | Update | Delete
InsertInto: TypeAlias = Callable[[Any], Any]
"""The database's own INSERT into a table, which has the same ``on_conflict_…`` methods for both."""

_GIVEN = "given_"


def given(value: Column[Any] | str) -> BindParameter[Any]:
    """A value that is given at each execution, by this name; by a column's name and of its type."""
    if isinstance(value, str):
        return bindparam(f"{_GIVEN}{value}")
    return bindparam(f"{_GIVEN}{value.name}", type_=Text() if isinstance(value.type, JsonText) else value.type)


def constant(value: str | int) -> ColumnClause[Any]:
    """A word or number of ours, the same at each execution, as part of the statement's text."""
    return literal_column(f"'{value}'" if isinstance(value, str) else f"{value}")


class Prepared:
    """One statement; its values are those made by ``given``. Others may be handed over with them, and do not matter."""

    def __init__(self, make: Callable[[InsertInto], Statement]) -> None:
        """``make`` is called once for each dialect, when it is first needed."""
        self._make = make
        self._on_postgresql: _OnPostgresql | None = None
        self._on_sqlite: _OnSqlite | None = None

    def rows(self, c: Connection, values: Values) -> list[Row]:
        """What it finds, or returns."""
        if c.dialect.name == "sqlite":
            own = self._on_sqlite or self._for_sqlite(c)
            return driver_of(c).execute(own.text, own.bound(values)).fetchall()
        other = self._on_postgresql or self._for_postgresql(c)
        return list(c.execute(other.statement, other.named(values)))

    def run(self, c: Connection, values: Values) -> int:
        """How many rows it changed or added. RETURNING would tell too, and takes SQLite 8 µs."""
        if c.dialect.name == "sqlite":
            own = self._on_sqlite or self._for_sqlite(c)
            return driver_of(c).execute(own.text, own.bound(values)).rowcount
        other = self._on_postgresql or self._for_postgresql(c)
        # Else SQLAlchemy has no count of what an INSERT added.
        return c.execute(other.statement, other.named(values), execution_options={"preserve_rowcount": True}).rowcount

    def run_each(self, c: Connection, several: Sequence[Values]) -> None:
        """Execute it with each of these."""
        if not several:
            return
        if c.dialect.name == "sqlite":
            own = self._on_sqlite or self._for_sqlite(c)
            driver_of(c).executemany(own.text, map(own.bound, several))
        else:
            other = self._on_postgresql or self._for_postgresql(c)
            c.execute(other.statement, [other.named(values) for values in several])

    def _for_sqlite(self, c: Connection) -> _OnSqlite:
        self._on_sqlite = _OnSqlite(self._make(sqlite.insert), c.dialect)
        return self._on_sqlite

    def _for_postgresql(self, c: Connection) -> _OnPostgresql:
        from sqlalchemy.dialects import postgresql  # noqa: PLC0415 - as in schema.py

        self._on_postgresql = _OnPostgresql(self._make(postgresql.insert), c.dialect)
        return self._on_postgresql


class _OnSqlite:
    """A statement as SQLite's driver takes it.

    Attributes:
        bound: the values in the order of the text's marks.
    """

    def __init__(self, statement: Statement, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        names = [_own(name) for name in compiled.positiontup]
        self.text = str(compiled)
        # Of a single name, itemgetter gives the value itself.
        self.bound: Callable[[Values], Sequence[Any]] = (
            itemgetter(*names) if len(names) > 1 else lambda values: [values[name] for name in names]
        )


class _OnPostgresql:
    """A statement as SQLAlchemy takes it."""

    def __init__(self, statement: Statement, dialect: Dialect) -> None:
        self.statement = statement
        self._names = [_own(name) for name in statement.compile(dialect=dialect).params]

    def named(self, values: Values) -> dict[str, Any]:
        """The values by the names that it has for them."""
        return {f"{_GIVEN}{name}": values[name] for name in self._names}


def _own(name: str) -> str:
    assert name.startswith(_GIVEN), f"{name} is not given, and not a constant"
    return name.removeprefix(_GIVEN)


def rows_of_text(c: Connection, statement: str, values: Values) -> list[Row]:
    """What a SELECT in plain SQL, with ``:name`` for each value, finds."""
    if c.dialect.name == "sqlite":
        return driver_of(c).execute(statement, values).fetchall()
    return list(c.execute(text(statement), dict(values)))
