"""Migrations: each applied once, in order, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, exc, inspect, text

from server.store.connecting import connect_postgresql, connect_sqlite, for_writing, parse_url
from server.store.database import Database, DatabaseError
from server.store.memories import delete_memory, keep_memory, search_memories
from server.store.migrations import MIGRATIONS, Migration, current_version, migrate
from server.store.schema import ALL_TABLES
from tests.harness.postgres import Cluster

from .scene import SCOPE, at

FIRST = Migration(version=1, both=("CREATE TABLE one (n INTEGER)",))
SECOND = Migration(
    version=2,
    both=("CREATE TABLE two (name {text})", "INSERT INTO one VALUES (1)"),
    sqlite=("INSERT INTO two VALUES ('sqlite')",),
    postgresql=("INSERT INTO two VALUES ('postgresql')",),
)
FAILING = Migration(version=3, both=("CREATE TABLE three (n INTEGER)", "INSERT INTO nowhere VALUES (1)"))


@pytest.fixture(params=["sqlite", "postgresql"])
def bare_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        url: str = request.getfixturevalue("bare_postgres_url")
        return url
    return f"sqlite:///{tmp_path / 'lumos.db'}"


@pytest.fixture
def engine(bare_url: str) -> Iterator[Engine]:
    url = parse_url(bare_url)
    connected = connect_sqlite(url, 5) if bare_url.startswith("sqlite") else connect_postgresql(url, 5)
    yield for_writing(connected)
    connected.dispose()


def versions(engine: Engine) -> list[int]:
    with engine.connect() as c:
        return list(c.execute(text("SELECT version FROM schema_version ORDER BY version")).scalars())


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


def test_each_migration_is_applied_once_from_wherever_the_database_is(engine: Engine) -> None:
    assert migrate(engine, (FIRST,)) == 1
    assert versions(engine) == [1]
    assert migrate(engine, (FIRST, SECOND)) == 1
    assert versions(engine) == [1, 2]
    assert migrate(engine, (FIRST, SECOND)) == 0
    with engine.connect() as c:
        assert c.execute(text("SELECT n FROM one")).scalars().all() == [1]
        assert c.execute(text("SELECT name FROM two")).scalars().all() == [engine.dialect.name]


def test_an_empty_database_walks_through_all_of_them(engine: Engine) -> None:
    assert migrate(engine, (FIRST, SECOND)) == 2
    assert versions(engine) == [1, 2]


def test_one_that_fails_leaves_the_version_before_it(engine: Engine) -> None:
    with pytest.raises(exc.DBAPIError):
        migrate(engine, (FIRST, SECOND, FAILING))
    assert versions(engine) == [1, 2]
    assert "three" not in tables(engine)
    assert migrate(engine, (FIRST, SECOND)) == 0


def test_a_first_one_that_fails_leaves_nothing(engine: Engine) -> None:
    with pytest.raises(exc.DBAPIError):
        migrate(engine, (FAILING,))
    assert not tables(engine)
    with engine.connect() as c:
        assert current_version(c) == 0


def test_a_database_of_a_newer_lumos_is_refused_and_left_alone(bare_url: str, engine: Engine) -> None:
    Database.open(bare_url).close()
    newer = MIGRATIONS[-1].version + 1
    with engine.connect() as c, c.begin():
        c.execute(text("INSERT INTO schema_version VALUES (:newer, 'then')"), {"newer": newer})
    reason = rf"of a newer Lumos \(schema version {newer}; this one knows up to {newer - 1}\): upgrade Lumos"
    with pytest.raises(DatabaseError, match=reason):
        Database.open(bare_url)
    with pytest.raises(DatabaseError, match=reason):
        migrate(engine)


def test_a_database_that_has_other_tables_of_our_names_is_refused(bare_url: str, engine: Engine) -> None:
    with engine.connect() as c, c.begin():
        c.execute(text("CREATE TABLE messages (mine INTEGER)"))
    with pytest.raises(DatabaseError, match=r'messages"? already exists'):
        Database.open(bare_url)
    assert tables(engine) == {"messages"}


def test_the_migrations_make_the_tables_that_the_store_works_with(bare_url: str, engine: Engine) -> None:
    Database.open(bare_url).close()
    made = inspect(engine)
    for table in ALL_TABLES:
        columns = {column["name"]: column["nullable"] for column in made.get_columns(table.name)}
        columns.pop("search", None)
        if "number" in columns:
            columns["number"] = False  # SQLite's INTEGER PRIMARY KEY is never NULL, and not declared so
        assert columns == {column.name: column.nullable for column in table.columns}, table.name
        keys = made.get_pk_constraint(table.name)["constrained_columns"]
        assert keys == [column.name for column in table.primary_key], table.name


def test_runs_without_words_are_found_when_their_session_is_deleted(engine: Engine) -> None:
    """Version 4 finds the others by their messages."""
    migrate(engine, MIGRATIONS[:3])
    with engine.connect() as c, c.begin():
        c.execute(text("INSERT INTO sessions VALUES ('t', 'u', 'a', 's', 'now', 'now')"))
        for run_id in ("spoken", "silent"):
            run = f"('{run_id}', 't', 'u', 'a', 's', 'done', 'now')"
            names = "run_id, tenant_id, user_id, agent_id, session_id, status, created_at"
            c.execute(text(f"INSERT INTO runs ({names}) VALUES {run}"))
        said = "('t', 'u', 'a', 's', 'spoken', 'user', 'hi', '[]', '[]', false, false, 'now')"
        names = (
            "tenant_id, user_id, agent_id, session_id, run_id, role, content, images, tool_calls, tool_failed, partial"
        )
        c.execute(text(f"INSERT INTO messages ({names}, created_at) VALUES {said}"))
    assert migrate(engine) == len(MIGRATIONS) - 3
    with engine.connect() as c:
        found = c.execute(text("SELECT run_id, unremembered FROM runs ORDER BY run_id")).all()
    assert [tuple(row) for row in found] == [("silent", True), ("spoken", None)]


def test_memories_of_version_4_are_found_and_not_indexed_twice(bare_url: str, engine: Engine) -> None:
    migrate(engine, MIGRATIONS[:4])
    with engine.connect() as c, c.begin():
        for number in range(3):
            keep_memory(c, SCOPE, f"old-{number}", "a dog", "fact", at(1))
        delete_memory(c, SCOPE, "old-2")
    migrate(engine)
    with engine.connect() as c, c.begin():
        for number in range(130):
            keep_memory(c, SCOPE, f"new-{number}", "a dog" if number % 50 == 0 else "a cat", "fact", at(1))
        delete_memory(c, SCOPE, "old-1")
        dogs = search_memories(c, SCOPE, "dog", 10)
    assert [memory.id for memory in dogs] == ["new-100", "new-50", "new-0", "old-0"]


def test_versions_count_up_from_one() -> None:
    assert [migration.version for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_a_database_in_a_poor_encoding_is_refused(postgres_cluster: Cluster) -> None:
    postgres_cluster.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1'")
    with pytest.raises(DatabaseError, match="its encoding is LATIN1: create it with ENCODING 'UTF8'"):
        Database.open(postgres_cluster.url("latin"))
    postgres_cluster.drop_database("latin")
