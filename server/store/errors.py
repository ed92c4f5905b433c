"""What the store raises, and how the database's own errors become that."""

from __future__ import annotations

import sqlite3

from sqlalchemy import exc

# https://www.sqlite.org/rescode.html: PERM, ABORT, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, CORRUPT, FULL,
# CANTOPEN, PROTOCOL, NOLFS, AUTH, NOTADB. What is missing here (ERROR, CONSTRAINT, MISUSE …) is a bug of ours.
_SQLITE_OPERATIONAL = frozenset({3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 22, 23, 26})
_PRIMARY_CODE = 0xFF


class DatabaseError(Exception):
    """The database cannot be opened or brought up to date; the text tells the operator why, without a password."""


class StoreUnavailableError(Exception):
    """The database could not answer now: locked, gone, full or too slow. Trying again later may help."""


class AlreadyThereError(Exception):
    """Something of that id is there already."""


def is_operational(error: exc.SQLAlchemyError | sqlite3.Error) -> bool:
    """Whether the state of the database is to blame, and not the statement."""
    if isinstance(error, exc.TimeoutError):
        return True
    if not isinstance(error, exc.DBAPIError | sqlite3.Error):
        return False
    own = error.orig if isinstance(error, exc.DBAPIError) else error
    if isinstance(own, sqlite3.Error):
        code: int | None = getattr(own, "sqlite_errorcode", None)
        return code is not None and code & _PRIMARY_CODE in _SQLITE_OPERATIONAL
    assert isinstance(error, exc.DBAPIError), "the other driver's are SQLAlchemy's"
    return error.connection_invalidated or isinstance(error, (exc.OperationalError, exc.InterfaceError))


def reason_of(error: BaseException) -> str:
    """The driver's own words on one line, without SQLAlchemy's statement and link."""
    orig = error.orig if isinstance(error, exc.DBAPIError) and error.orig is not None else error
    return " ".join(str(orig).split()) or type(orig).__name__
