"""The database: an engine, and the worker threads that its queries run in."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar, TypeVarTuple

import outcome
import trio
from sqlalchemy import URL, Connection, Engine, exc, text

from .connecting import (
    POSTGRESQL_WRITERS,
    READERS,
    SQLITE_WRITERS,
    connect_postgresql,
    connect_sqlite,
    driver_of,
    for_writing,
    is_in_memory,
    parse_url,
    shown,
    without_secrets,
)
from .errors import AlreadyThereError, DatabaseError, StoreUnavailableError, is_operational, reason_of
from .grouped_writes import QUEUE_SECONDS, Change, GroupedWrites, Outcome
from .migrations import is_current, migrate
from .presence import present_beside, present_in
from .transactions import KeptTransactions, PooledTransactions, Transactions

__all__ = ["AlreadyThereError", "Database", "DatabaseError", "StoreUnavailableError"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

BUSY_SECONDS = 5.0
TIDY_SECONDS = 1.0


class Database:
    """Runs the store's functions, each in a transaction of its own, in worker threads of its own limiters.

    A query that the database fails for its own reasons (locked, gone, too slow) raises ``StoreUnavailableError``; what
    else a function raises passes, and its transaction is rolled back. Whoever opens a ``Database`` closes it.

    Attributes:
        dialect: which of the two databases it is.
        name: its URL for people and logs, without password.
    """

    dialect: Literal["sqlite", "postgresql"]
    name: str

    def __init__(self, url: URL, engine: Engine, *, inline: bool) -> None:
        self.dialect = "sqlite" if engine.dialect.name == "sqlite" else "postgresql"
        self.name = shown(url)
        self._url = url
        self._engine = engine
        self._inline = inline
        self._reading, self._writing = _transactions(url, engine)
        self._writers = trio.CapacityLimiter(SQLITE_WRITERS if self.dialect == "sqlite" else POSTGRESQL_WRITERS)
        # One connection cannot serve two threads at once.
        self._readers = self._writers if is_in_memory(url) else trio.CapacityLimiter(READERS)
        # On PostgreSQL writers do not wait for each other, and would hold each other's locks.
        in_file = self.dialect == "sqlite" and not is_in_memory(url)
        self._grouped = GroupedWrites(self._make_together) if in_file and not inline else None
        self._changed = trio.Event()

    @classmethod
    def open(cls, url: str, *, inline: bool = False, busy_timeout: float = BUSY_SECONDS) -> Database:
        """Connect, make or migrate the tables. Blocks: for the start of a program, not for a running one.

        Args:
            url: ``sqlite:///file``, ``sqlite://`` (in memory) or ``postgresql://…``.
            inline: run the queries in the calling task: for tests on a virtual clock.
            busy_timeout: seconds that a query waits for a lock (SQLite) or may take at all (PostgreSQL).

        Raises:
            DatabaseError: it cannot be opened or migrated; the text tells why.
        """
        parsed = parse_url(url)
        connect = connect_sqlite if parsed.drivername.startswith("sqlite") else connect_postgresql
        engine = connect(parsed, busy_timeout)
        try:
            _bring_up_to_date(engine)
        except (exc.SQLAlchemyError, DatabaseError) as error:
            engine.dispose()
            reason = without_secrets(parsed, reason_of(error))
            # `from None`: the error's own text may hold what the URL holds.
            raise DatabaseError(f"the database {shown(parsed)} cannot be used: {reason}") from None
        except BaseException:
            engine.dispose()
            raise
        return cls(parsed, engine, inline=inline)

    async def read(self, query: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """What the query gives. When cancelled, returns at once; its thread ends the query and frees the connection.

        Raises:
            StoreUnavailableError: the database failed.
        """
        if self._inline:
            await trio.lowlevel.checkpoint()
            return self._run(self._reading, query, *args)
        return await trio.to_thread.run_sync(
            self._run, self._reading, query, *args, abandon_on_cancel=True, limiter=self._readers
        )

    async def write(self, change: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """Make the change and commit it. Cancelled before it has begun, does nothing; after that, runs to its end.

        Raises:
            StoreUnavailableError: the database failed, or others' changes took too long; nothing of the change was
                kept, unless the connection was lost while it was being committed.
        """
        if self._grouped is None:
            return await self._write_alone(change, *args, may_give_up=False)
        changed = await self._grouped.write(lambda c: change(c, *args))
        self._changed.set()
        return changed

    async def keep(self, change: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """As ``write``, but when cancelled, returns at once: the change may be made all the same, so do it again."""
        if self._grouped is None:
            return await self._write_alone(change, *args, may_give_up=True)
        changed = await self._grouped.write(lambda c: change(c, *args), may_give_up=True)
        self._changed.set()
        return changed

    async def _write_alone(self, change: Callable[[Connection, *Ts], T], *args: *Ts, may_give_up: bool) -> T:
        if self._inline:
            await trio.lowlevel.checkpoint()
            return self._run(self._writing, change, *args)
        with trio.move_on_after(QUEUE_SECONDS):
            return await trio.to_thread.run_sync(
                self._run, self._writing, change, *args, abandon_on_cancel=may_give_up, limiter=self._writers
            )
        raise StoreUnavailableError(f"{self.name}: other changes take longer than {QUEUE_SECONDS:g} s")

    async def keep_tidy(self) -> None:
        """A second after a change, have SQLite take its log over into its file; for as long as it is not cancelled.

        Else changes do that, one in a few dozen, and wait for the disk: 18 ms instead of 0.3. If it fails, the next one
        does it, or a change.
        """
        while self._grouped is not None:
            await self._changed.wait()
            await trio.sleep(TIDY_SECONDS)
            self._changed = trio.Event()
            await trio.to_thread.run_sync(self._take_over, limiter=self._readers)

    @contextmanager
    def present(self, clean_up: Callable[[Connection], object]) -> Iterator[None]:
        """While the block runs, this process counts as a server of the database; the only one first cleans up. Blocks.

        Raises:
            StoreUnavailableError: the database failed.
            OSError: the file beside an SQLite database cannot be made.
        """

        def in_transaction() -> None:
            self._run(self._writing, clean_up)

        if is_in_memory(self._url):
            in_transaction()
            yield
        elif self.dialect == "sqlite":
            with present_beside(Path(str(self._url.database)), in_transaction):
                yield
        else:
            with present_in(self._engine, in_transaction):
                yield

    def close(self) -> None:
        """Close the connections; those of queries under way close when these end. May be called twice."""
        self._reading.close()
        self._writing.close()
        self._engine.dispose()

    def _run(self, transactions: Transactions, function: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        try:
            return transactions.run(function, *args)
        except (exc.SQLAlchemyError, sqlite3.Error) as error:
            if is_operational(error):
                reason = without_secrets(self._url, reason_of(error))
                raise StoreUnavailableError(f"{self.name}: {reason}") from error
            raise

    def _take_over(self) -> None:
        with suppress(exc.SQLAlchemyError, sqlite3.Error), self._engine.connect() as c:
            driver_of(c).execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _make_together(self, changes: Sequence[Change]) -> Sequence[Outcome]:
        """In one transaction; a change that raises is undone and leaves the others alone."""
        if len(changes) == 1:
            return [outcome.Value(self._run(self._writing, changes[0]))]
        try:
            return self._run(self._writing, _each_by_itself, changes)
        except StoreUnavailableError as error:  # everybody's: nothing was kept
            return [outcome.Error(_for_one(error)) for _ in changes]


def _transactions(url: URL, engine: Engine) -> tuple[Transactions, Transactions]:
    """Those that read and those that write."""
    if engine.dialect.name == "postgresql":
        pooled = PooledTransactions(engine)
        return pooled, pooled
    writing = KeptTransactions(engine, writes=True)
    return (writing if is_in_memory(url) else KeptTransactions(engine, writes=False)), writing


def _for_one(shared: StoreUnavailableError) -> StoreUnavailableError:
    """The error once more: one that several tasks raised would collect all their tracebacks."""
    error = StoreUnavailableError(*shared.args)
    error.__cause__ = shared.__cause__
    return error


def _each_by_itself(c: Connection, changes: Sequence[Change]) -> Sequence[Outcome]:
    """What became of each. Raises what makes the whole transaction useless."""
    became: list[Outcome] = []
    driver = driver_of(c)
    for change in changes:
        driver.execute("SAVEPOINT change")
        try:
            became.append(outcome.Value(change(c)))
        except Exception as error:
            if isinstance(error, exc.SQLAlchemyError | sqlite3.Error) and is_operational(error):
                raise
            driver.execute("ROLLBACK TO change")
            became.append(outcome.Error(error))
        driver.execute("RELEASE change")
    return became


def _bring_up_to_date(engine: Engine) -> None:
    with engine.connect() as c, c.begin():
        if c.dialect.name == "postgresql":
            encoding = c.execute(text("SHOW server_encoding")).scalar_one()
            if encoding != "UTF8":
                raise DatabaseError(f"its encoding is {encoding}: create it with ENCODING 'UTF8'")
        current = is_current(c)
    if not current:
        migrate(for_writing(engine))
