"""The database: what it opens and refuses, what it does when it is locked, gone or cancelled."""

from __future__ import annotations

import importlib.util
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest
import trio
from sqlalchemy import Connection, exc, text

from server.store.connecting import READERS
from server.store.database import Database, DatabaseError, StoreUnavailableError
from server.store.memories import add_memory, count_memories
from server.store.turns import begin_turn, find_run

from .scene import SCOPE, at, said

SHORT_SECONDS = 0.2


def begin(run_id: str) -> Callable[[Connection], object]:
    return lambda c: begin_turn(c, SCOPE, "session", run_id, None, said("hello"), at(1))


@contextmanager
def locked(database_url: str) -> Iterator[None]:
    """Somebody else holds what every writer needs."""
    if database_url.startswith("sqlite"):
        other = sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        yield
        other.close()
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute("LOCK TABLE runs IN EXCLUSIVE MODE")
            yield


async def test_what_was_written_is_there_when_it_is_opened_again(database_url: str) -> None:
    for run_id in ("one", "two"):
        database = Database.open(database_url)
        await database.write(begin(run_id))
        assert await database.read(find_run, "one") is not None
        database.close()
        database.close()


async def test_a_change_that_raises_is_undone_and_its_error_passes(database: Database) -> None:
    def fail(c: Connection) -> None:
        begin("run")(c)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await database.write(fail)
    assert await database.read(find_run, "run") is None


async def test_a_bug_in_a_statement_is_no_state_of_the_database(database: Database) -> None:
    with pytest.raises(exc.DBAPIError):
        await database.read(lambda c: c.execute(text("SELECT nothing FROM nowhere")))
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda c: c.execute(text("INSERT INTO schema_version VALUES (1, NULL)")))


async def test_a_locked_database_is_unavailable_in_bounded_time_and_still_read(database_url: str) -> None:
    database = Database.open(database_url, busy_timeout=SHORT_SECONDS)
    with locked(database_url):
        with trio.fail_after(20), pytest.raises(StoreUnavailableError) as caught:
            await database.write(begin("run"))
        assert await database.read(find_run, "run") is None
    assert any(word in str(caught.value) for word in ("locked", "timeout"))
    await database.write(begin("run"))
    assert await database.read(find_run, "run") is not None
    database.close()


async def test_a_lost_connection_is_unavailable_and_the_next_is_new(postgres_url: str) -> None:
    database = Database.open(postgres_url)

    def cut_while_used(c: Connection) -> None:
        number = c.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with psycopg.connect(postgres_url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", (number,))
        c.execute(text("SELECT 1"))

    with pytest.raises(StoreUnavailableError):
        await database.read(cut_while_used)
    assert await database.read(find_run, "run") is None
    with psycopg.connect(postgres_url, autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
    await database.write(begin("run"))
    database.close()


def test_a_corrupt_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lumos.db"
    Database.open(f"sqlite:///{path}").close()
    healthy = path.read_bytes()
    path.write_bytes(healthy[:4096] + b"\xff" * (len(healthy) - 4096))
    with pytest.raises(DatabaseError, match="malformed"):
        Database.open(f"sqlite:///{path}")


async def test_a_cancelled_read_returns_at_once_and_gives_its_connection_back(database: Database) -> None:
    go_on = threading.Event()
    begun = threading.Semaphore(0)

    def wait(c: Connection) -> None:
        c.execute(text("SELECT 1"))
        begun.release()
        go_on.wait()

    def wait_for_all() -> None:
        for _ in range(READERS):
            begun.acquire()

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(READERS):
                nursery.start_soon(database.read, wait)
            await trio.to_thread.run_sync(wait_for_all)
            nursery.cancel_scope.cancel()
        assert not go_on.is_set()
    finally:
        go_on.set()
    for _ in range(2 * READERS):
        assert await database.read(find_run, "run") is None


async def test_a_cancelled_write_is_carried_through(database: Database) -> None:
    go_on, begun = threading.Event(), threading.Event()
    ended = []

    def slow(c: Connection) -> None:
        begin("run")(c)
        begun.set()
        go_on.wait()

    async def write() -> None:
        await database.write(slow)
        ended.append("written")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.to_thread.run_sync(begun.wait)
        nursery.cancel_scope.cancel()
        go_on.set()
    assert ended == ["written"]
    assert await database.read(find_run, "run") is not None


async def test_a_write_that_is_cancelled_while_it_waits_for_its_turn_does_nothing(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path / 'lumos.db'}")
    go_on, begun = threading.Event(), threading.Event()

    def slow(c: Connection) -> None:
        begun.set()
        go_on.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.write, slow)
        await trio.to_thread.run_sync(begun.wait)
        with trio.CancelScope() as scope:
            scope.cancel()
            await database.write(begin("run"))
        assert scope.cancelled_caught
        assert await database.read(find_run, "run") is None
        go_on.set()
    assert await database.read(find_run, "run") is None
    database.close()


async def test_closing_under_a_query_lets_it_end(database_url: str) -> None:
    database = Database.open(database_url)
    go_on, begun = threading.Event(), threading.Event()
    answers = []

    def wait(c: Connection) -> None:
        begun.set()
        go_on.wait()
        answers.append(c.execute(text("SELECT 1")).scalar_one())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.read, wait)
        await trio.to_thread.run_sync(begun.wait)
        database.close()
        go_on.set()
    assert answers == [1]


async def test_many_tasks_write_and_read_at_once(database: Database) -> None:
    async def work(number: int) -> None:
        await database.write(add_memory, SCOPE, str(number), "dog", "fact", at(1))
        await database.read(count_memories, SCOPE, None)

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(work, number)
    assert await database.read(count_memories, SCOPE, None) == 40


async def test_a_database_in_memory_serves_many_tasks() -> None:
    database = Database.open("sqlite://")
    assert database.dialect == "sqlite"
    await test_many_tasks_write_and_read_at_once(database)
    database.close()


async def test_inline_a_query_takes_no_time_and_can_be_cancelled_before(autojump_clock: object) -> None:
    database = Database.open("sqlite://", inline=True)
    began = trio.current_time()
    await database.write(begin("run"))
    assert await database.read(find_run, "run") is not None
    assert trio.current_time() == began
    with trio.CancelScope() as scope:
        scope.cancel()
        await database.write(begin("other"))
    assert scope.cancelled_caught
    assert await database.read(find_run, "other") is None
    database.close()


class Told(Database):
    """A database that tells when its file has taken over what was written."""

    def tell(self, taken_over: Callable[[], None]) -> None:
        self._tell = taken_over

    def _take_over(self) -> None:
        super()._take_over()
        self._tell()


async def test_soon_after_a_change_the_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.store.database.TIDY_SECONDS", 0)

    def runs_in_the_file_alone() -> int:
        copy = tmp_path / "copy.db"
        shutil.copy(tmp_path / "lumos.db", copy)
        with closing(sqlite3.connect(copy)) as c:
            count: int = c.execute("SELECT count(*) FROM runs").fetchone()[0]
            return count

    database = Told.open(f"sqlite:///{tmp_path / 'lumos.db'}")
    assert isinstance(database, Told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.keep_tidy)
        for number in range(2):
            taken_over = trio.Event()
            database.tell(partial(trio.lowlevel.current_trio_token().run_sync_soon, taken_over.set))
            await database.write(begin(f"run-{number}"))
            await taken_over.wait()
            assert runs_in_the_file_alone() == number + 1
        nursery.cancel_scope.cancel(reason="the test")
    database.close()


async def test_what_has_no_writer_of_its_own_is_tidy(database_url: str) -> None:
    database = Database.open(database_url, inline=database_url.startswith("sqlite"))
    await database.write(begin("run"))
    await database.keep_tidy()
    database.close()


def test_a_new_file_is_its_owners_alone_and_in_wal_mode(tmp_path: Path) -> None:
    path = tmp_path / "lumos.db"
    database = Database.open(f"sqlite:///{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    database.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_who_opens_a_new_file_while_another_writes_in_it_waits(tmp_path: Path) -> None:
    path = tmp_path / "lumos.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # not yet in WAL mode: SQLite refuses to change that, and does not wait
    later = threading.Timer(SHORT_SECONDS, other.rollback)
    later.start()
    Database.open(f"sqlite:///{path}").close()
    later.join()
    other.close()


def test_a_new_file_that_another_holds_for_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lumos.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="locked"):
        Database.open(f"sqlite:///{path}", busy_timeout=SHORT_SECONDS)
    other.close()


def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"missing/lumos\.db cannot be opened: No such file"):
        Database.open(f"sqlite:///{tmp_path}/missing/lumos.db")
    with pytest.raises(DatabaseError, match="Is a directory"):
        Database.open(f"sqlite:///{tmp_path}")
    other = tmp_path / "letter.txt"
    other.write_text("Dear reader, this is no database. " * 100)
    with pytest.raises(DatabaseError, match=r"letter\.txt cannot be used: file is not a database"):
        Database.open(f"sqlite:///{other}")


@pytest.mark.parametrize(
    "url", ["", "lumos.db", "mysql://u:hunter2@h/d", "postgresql+asyncpg://u:hunter2@h/d", "http://"]
)
def test_other_urls_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(DatabaseError, match="sqlite://") as caught:
        Database.open(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_name_of_postgresql_means_psycopg(postgres_url: str, scheme: str) -> None:
    database = Database.open(postgres_url.replace("postgresql", scheme))
    assert database.dialect == "postgresql"
    assert database.name == postgres_url
    database.close()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hunter2@127.0.0.1:1/lumos",
        "postgresql://user@127.0.0.1:1/lumos?password=hunter2",
        "postgresql://user:hunter2@127.0.0.1:port/lumos",
        "postgresql://user:hunter2@127.0.0.1:1/lumos?connect_timeout=hunter2",
    ],
)
def test_a_password_is_in_no_error(url: str) -> None:
    with pytest.raises(DatabaseError) as caught:
        Database.open(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_without_psycopg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatabaseError, match=r"pip install 'lumos-stream\[postgres\]'"):
        Database.open("postgresql://127.0.0.1/lumos")
