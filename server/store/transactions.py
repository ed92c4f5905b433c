"""Transactions that the store's functions run in: on connections of SQLAlchemy's pool, or on kept ones of SQLite's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, TypeVarTuple

from sqlalchemy import Connection, Engine

from .connecting import driver_of

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Transactions(Protocol):
    """Where functions run, each in a transaction of its own. May be used in several threads at once."""

    def run(self, function: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """What the function gives, once that is committed. Whatever it raises passes, and all is rolled back."""
        ...

    def close(self) -> None:
        """Keep no connection any longer; those in use close when their transaction ends. May be called twice."""
        ...


class PooledTransactions:
    """Each on a connection of the engine's pool, begun and ended by SQLAlchemy."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._closed = False

    def run(self, function: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """See ``Transactions``."""
        with self._engine.connect() as c:
            try:
                with c.begin():
                    return function(c, *args)
            finally:
                if self._closed:
                    c.detach()  # its pool is gone: let it close

    def close(self) -> None:
        """See ``Transactions``."""
        self._closed = True


class KeptTransactions:
    """SQLite's: begun and ended by its driver, one after the other on connections that are kept.

    SQLAlchemy's pool, transaction and events take 50 µs, SQLite's BEGIN and COMMIT of nothing 5. And a connection that
    goes on after its own last write has its pages and statements still in its caches.
    """

    def __init__(self, engine: Engine, *, writes: bool) -> None:
        """``writes``: whether they take SQLite's write lock when they begin."""
        self._engine = engine
        self._begin = "BEGIN IMMEDIATE" if writes else "BEGIN"
        self._idle: list[Connection] = []
        self._closed = False

    def run(self, function: Callable[[Connection, *Ts], T], *args: *Ts) -> T:
        """See ``Transactions``. A connection whose transaction failed is not kept."""
        c = self._take_idle() or self._engine.connect()
        driver = driver_of(c)
        try:
            driver.execute(self._begin)
            result = function(c, *args)
            if c.in_transaction():  # the function had SQLAlchemy execute something, which then thinks that it began it
                c.commit()
            else:
                driver.commit()
        except BaseException:
            self._let_go(c)  # which rolls back
            raise
        self._idle.append(c)
        if self._closed:
            self.close()
        return result

    def close(self) -> None:
        """See ``Transactions``."""
        self._closed = True
        while c := self._take_idle():
            self._let_go(c)

    def _take_idle(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:  # not asked before: another thread may take the last
            return None

    def _let_go(self, c: Connection) -> None:
        if self._closed:
            c.detach()  # its pool is gone: let it close
        c.close()
