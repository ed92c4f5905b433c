"""Statements of every run's start and end: written in SQLAlchemy's terms, compiled once, then given to the driver.

Building a statement and its cache key anew costs 60 µs each time, executing one that is built 17 µs more than SQLite's
own 2 µs, and a start has a dozen. On PostgreSQL, where the network costs more than that, SQLAlchemy executes them.

What a statement says of its own accord, ``constant`` writes into its text: SQLite plans a statement anew, for 40 to 70
µs, whenever a value was bound that might decide whether a partial index serves (https://www.sqlite.org/c3ref/prepare.html).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnClause,
    Connection,
    Delete,
    Insert,
    Select,
    Update,
    bindparam,
    literal_column,
    text,
)
from sqlalchemy.dialects import sqlite

from .connecting import driver_of

Values: TypeAlias = Mapping[str, Any]
Row: TypeAlias = Sequence[Any]
Statement: TypeAlias = Select[Any] | Insert | Update | Delete
InsertInto: TypeAlias = Callable[[Any], Any]
"""The database's own INSERT into a table, which has the same ``on_conflict_…`` methods for both."""

_GIVEN = "given_"
_Process: TypeAlias = Callable[[Any], Any] | None


def given(value: Column[Any] | str) -> BindParameter[Any]:
    """A value that is given at each execution, by this name; by a column's name and of its type."""
    if isinstance(value, str):
        return bindparam(f"{_GIVEN}{value}")
    return bindparam(f"{_GIVEN}{value.name}", type_=value.type)


def constant(word: str) -> ColumnClause[str]:
    """A word of ours, the same at each execution, as part of the statement's text."""
    return literal_column(f"'{word}'")


class Prepared:
    """One statement; its values are those made by ``given``."""

    def __init__(self, make: Callable[[InsertInto], Statement]) -> None:
        """``make`` is called once for each dialect, when it is first needed."""
        self._make = make
        self._on_postgresql: Statement | None = None
        self._on_sqlite: _Compiled | None = None

    def rows(self, c: Connection, values: Values) -> list[Row]:
        """What it finds, or returns."""
        if c.dialect.name == "sqlite":
            compiled = self._compiled(c)
            found = driver_of(c).execute(compiled.text, compiled.bound(values)).fetchall()
            return found if compiled.is_plain else [compiled.processed(row) for row in found]
        return list(c.execute(self._built(), _named(values)))

    def run(self, c: Connection, values: Values) -> int:
        """How many rows it changed or added. RETURNING would tell too, and takes SQLite 8 µs."""
        if c.dialect.name == "sqlite":
            compiled = self._compiled(c)
            return driver_of(c).execute(compiled.text, compiled.bound(values)).rowcount
        # Else SQLAlchemy has no count of what an INSERT added.
        return c.execute(self._built(), _named(values), execution_options={"preserve_rowcount": True}).rowcount

    def run_each(self, c: Connection, several: Sequence[Values]) -> None:
        """Execute it with each of these."""
        if not several:
            return
        if c.dialect.name == "sqlite":
            compiled = self._compiled(c)
            driver_of(c).executemany(compiled.text, map(compiled.bound, several))
        else:
            c.execute(self._built(), [_named(values) for values in several])

    def _built(self) -> Statement:
        if self._on_postgresql is None:
            from sqlalchemy.dialects import postgresql  # noqa: PLC0415 - as in schema.py

            self._on_postgresql = self._make(postgresql.insert)
        return self._on_postgresql

    def _compiled(self, c: Connection) -> _Compiled:
        if self._on_sqlite is None:
            self._on_sqlite = _Compiled(self._make(sqlite.insert), c)
        return self._on_sqlite


class _Compiled:
    """A statement as SQLite's driver takes it."""

    def __init__(self, statement: Statement, c: Connection) -> None:
        dialect = c.dialect
        compiled: Any = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self._binds: list[tuple[str | None, Any, _Process]] = []
        for name in compiled.positiontup:
            bind: BindParameter[Any] = compiled.binds[name]
            process = bind.type.dialect_impl(dialect).bind_processor(dialect)
            if name.startswith(_GIVEN):
                self._binds.append((name.removeprefix(_GIVEN), None, process))
            else:
                value = bind.effective_value
                self._binds.append((None, process(value) if process else value, None))
        columns: Iterable[Any] = getattr(statement, "exported_columns", ())
        self._processes = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns]
        self.is_plain = not any(self._processes)

    def bound(self, values: Values) -> list[Any]:
        """The values in the order of the statement's marks."""
        return [
            fixed if name is None else values[name] if process is None else process(values[name])
            for name, fixed, process in self._binds
        ]

    def processed(self, row: Row) -> Row:
        """The row as its columns' types have it."""
        return tuple(
            value if process is None else process(value) for process, value in zip(self._processes, row, strict=True)
        )


def rows_of_text(c: Connection, statement: str, values: Values) -> list[Row]:
    """What a SELECT in plain SQL, with ``:name`` for each value, finds."""
    if c.dialect.name == "sqlite":
        return driver_of(c).execute(statement, values).fetchall()
    return list(c.execute(text(statement), dict(values)))


def _named(values: Values) -> dict[str, Any]:
    return {f"{_GIVEN}{name}": value for name, value in values.items()}
