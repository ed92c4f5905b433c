"""Full-text search: what is found, in which order, the same in both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection

from server.store.database import Database
from server.store.memories import add_memory, clear_memories, delete_memory, search_memories, update_memory
from server.store.rows import Scope
from server.store.search import MAX_CANDIDATES
from tests.harness.postgres import Cluster

from .scene import FOREIGN_SCOPES, SCOPE, at

TEXTS = {
    "rex": "My dog is called Rex and he is three years old.",
    "tea": "I like green tea in the morning.",
    "work": "I work as a dentist in Lyon; the practice has a dog too, a dog that barks.",
    "猫": "我的猫叫小白。它很喜欢吃鱼。",
    "東京": "東京タワーの近くに住んでいます。",
    "서울": "저는 서울에서 살고 있습니다.",
    "café": "The CAFÉ Zoë opens at 7.",
    "number": "My flight is LH454 on 2026-12-24.",
}


def add_texts(c: Connection, scope: Scope, texts: dict[str, str]) -> None:
    for memory_id, text in texts.items():
        add_memory(c, scope, memory_id, text, "fact", at(1))


async def found(database: Database, query: str, limit: int = 10) -> list[str]:
    return [memory.id for memory in await database.read(search_memories, SCOPE, query, limit)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("What is my dog called?", ["rex", "work"]),
        ("dog", ["work", "rex"]),
        ("DENTIST", ["work"]),
        ("green or black tea", ["tea"]),
        ("小白", ["猫"]),
        ("鱼", ["猫"]),
        ("你的猫喜欢什么", ["猫"]),
        ("タワー", ["東京"]),
        ("ﾀﾜｰ", ["東京"]),
        ("東京に行きたい", ["東京"]),
        ("서울", ["서울"]),
        ("서울은", ["서울"]),
        ("cafe\u0301 zoë", ["café"]),
        ("cafe", []),
        ("lh454", ["number"]),
        ("2026", ["number"]),
        ("the", ["café", "tea", "work"]),
        ("the tea", ["tea"]),
        ("nothing of this", []),
        ("", []),
        ("?!", []),
    ],
)
async def test_a_query_finds_what_has_its_words(database: Database, query: str, expected: list[str]) -> None:
    await database.write(add_texts, SCOPE, TEXTS)
    assert await found(database, query) == expected


@pytest.mark.parametrize(
    "query",
    [
        '"tea',
        "tea'",
        "tea''--",
        "tea*",
        "-tea",
        "^tea",
        "terms:tea",
        "owner : tea",
        "{terms owner} : tea",
        "NEAR(tea, 2)",
        "tea AND NOT tea",
        "tea & !tea | (",
        "tea:* <-> \\",
        "tea\0",
        "tea \ud800",
        "tea); DROP TABLE memories; --",
        ":match_0 tea %s %(x)s ?",
        "tea " * 5000,
        " ".join(f"w{number}" for number in range(30)) + " tea",
    ],
)
async def test_nothing_that_a_user_types_is_syntax(database: Database, query: str) -> None:
    await database.write(add_texts, SCOPE, {"tea": "green tea", "work": "dentist", "owner": "nothing"})
    assert "tea" in await found(database, query)
    assert "work" not in await found(database, query)


async def test_a_search_stays_in_its_scope(database: Database) -> None:
    for scope in FOREIGN_SCOPES:
        await database.write(add_texts, scope, TEXTS)
    assert await found(database, "dog tea 猫") == []
    await database.write(add_texts, SCOPE, {"mine": "dog"})
    assert await found(database, "dog tea 猫") == ["mine"]


async def test_the_best_come_first_and_scores_fall(database: Database) -> None:
    texts = {f"filler-{number}": f"filler about dogs number {number}" for number in range(20)}
    await database.write(add_texts, SCOPE, {**texts, "rare": "dogs and aardvarks", "both": "aardvarks filler dogs"})
    memories = await database.read(search_memories, SCOPE, "filler dogs aardvarks", 5)
    assert [memory.id for memory in memories][:2] == ["both", "rare"]
    scores = [memory.score or 0 for memory in memories]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0
    assert len(memories) == 5
    assert await found(database, "dogs", 0) == []


async def test_common_words_do_not_crowd_out_a_rare_one(database: Database) -> None:
    texts = {"old": "the aardvark is common"} | {f"id-{number}": "common words" for number in range(2 * MAX_CANDIDATES)}
    await database.write(add_texts, SCOPE, texts)
    assert (await found(database, "common aardvark words"))[0] == "old"
    assert await found(database, "common", 2) == [f"id-{2 * MAX_CANDIDATES - 1}", f"id-{2 * MAX_CANDIDATES - 2}"]
    newest = [f"id-{2 * MAX_CANDIDATES - 1 - number}" for number in range(MAX_CANDIDATES)]
    assert await found(database, "common", 2 * MAX_CANDIDATES) == newest


async def test_a_very_long_memory_is_kept_whole_and_found_by_its_beginning(database: Database) -> None:
    long = "aardvark " + "".join(chr(0x20000 + number % 40_000) for number in range(30_000)) + " zebra"
    await database.write(add_texts, SCOPE, {"long": long})
    (memory,) = await database.read(search_memories, SCOPE, "aardvark", 5)
    assert memory.text == long
    assert await found(database, "zebra") == []


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
async def test_what_the_index_has_not_taken_yet_is_found_as_well(database: Database, count: int) -> None:
    """SQLite's takes 64 at a time (version 5)."""
    await database.write(add_texts, SCOPE, {str(number): f"dog{number} barks" for number in range(count)})
    for number in {0, count // 2, count - 1}:
        assert await found(database, f"dog{number}") == [str(number)]
    for number in {0, count - 1}:
        await database.write(update_memory, SCOPE, str(number), f"cat{number} purrs", None, at(2))
        assert await found(database, f"dog{number}") == []
        assert await found(database, f"cat{number}") == [str(number)]
        await database.write(delete_memory, SCOPE, str(number))
        assert await found(database, f"cat{number}") == []
    await database.write(add_texts, SCOPE, {f"later-{number}": "barks" for number in range(70)})
    assert len(await found(database, "barks", 300)) == count - len({0, count - 1}) + 70
    assert await found(database, "purrs") == []


async def test_few_and_short_ones_wait_for_the_index(tmp_path: Path) -> None:
    def upto(c: Connection) -> tuple[int, int | None]:
        c.exec_driver_sql("INSERT INTO memory_index (memory_index, rank) VALUES ('integrity-check', 0)")
        (row,) = c.exec_driver_sql("SELECT upto, (SELECT max(number) FROM memories) FROM memories_indexed").all()
        indexed = c.exec_driver_sql("SELECT rowid FROM memory_index WHERE memory_index MATCH 'terms : dog'").all()
        having = "SELECT number FROM memories WHERE ' ' || terms || ' ' LIKE '% dog %' AND number <= ?"
        assert indexed == c.exec_driver_sql(having, (row[0],)).all()
        return row[0], row[1]

    database = Database.open(f"sqlite:///{tmp_path / 'lumos.db'}")
    long = "a dog barks " * 100
    await database.write(add_texts, SCOPE, {str(number): "dog" for number in range(150)})
    assert await database.write(upto) == (128, 150)
    await database.write(add_texts, SCOPE, {"long": long})
    assert await database.write(upto) == (151, 151)
    await database.write(add_texts, SCOPE, {"after": "dog", "later": "cat"})
    assert await database.write(upto) == (151, 153)
    for number, memory_id in enumerate(["5", "149", "after"]):
        await database.write(update_memory, SCOPE, memory_id, f"cat{number}", None, at(2))
        assert await database.write(upto) == (151, 153)
        assert await found(database, f"cat{number}") == [memory_id]
    await database.write(update_memory, SCOPE, "after", long, None, at(2))
    assert await database.write(upto) == (153, 153)
    assert await found(database, "barks") == ["after", "long"]
    await database.write(delete_memory, SCOPE, "later")
    await database.write(clear_memories, SCOPE)
    assert await database.write(upto) == (153, None)
    database.close()


@pytest.fixture(scope="module")
def both(postgres_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, Database]]:
    name = postgres_cluster.create_database()
    file = Database.open(f"sqlite:///{tmp_path_factory.mktemp('both') / 'lumos.db'}")
    served = Database.open(postgres_cluster.url(name))
    yield file, served
    file.close()
    served.close()
    postgres_cluster.drop_database(name)


_words = st.sampled_from(
    ["dog", "cat", "the", "我的猫", "猫", "タワー", "tea", "Straße", "é", "हिन्दी", "ไทย", "7", "'", '"', "&"]
)
_texts = st.lists(_words, max_size=8).map(" ".join) | st.text(max_size=12)


@given(texts=st.lists(_texts, max_size=12), query=_texts)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_both_databases_find_the_same_in_the_same_order(
    both: tuple[Database, Database], texts: list[str], query: str
) -> None:
    answers = []
    for database in both:
        await database.write(clear_memories, SCOPE)
        await database.write(add_texts, SCOPE, {str(number): text for number, text in enumerate(texts)})
        await database.write(delete_memory, SCOPE, str(len(texts) // 2))
        await database.write(update_memory, SCOPE, "0", "the dog", None, at(2))
        memories = await database.read(search_memories, SCOPE, query, 10)
        answers.append([(memory.id, memory.text, memory.score) for memory in memories])
    assert answers[0] == answers[1]
