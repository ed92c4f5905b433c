"""Merge patches as RFC 7396 has them, and what a working memory does not take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory import MemoryRefusedError, WorkingMemoryChange
from server.records import WorkingMemorySettings
from server.store.database import Database
from server.working_memory import MAX_DEPTH, merge_patch, patch_document, read_document, replace_document
from tests.server.memory_scene import ANN

NOW = "2026-11-22T00:00:00.000000+00:00"
SETTINGS = WorkingMemorySettings(template={"name": "", "likes": ["jazz"]}, max_bytes=100)

# RFC 7396, appendix A: original, patch, result.
EXAMPLES = """
{"a":"b"} | {"a":"c"} | {"a":"c"}
{"a":"b"} | {"b":"c"} | {"a":"b","b":"c"}
{"a":"b"} | {"a":null} | {}
{"a":"b","b":"c"} | {"a":null} | {"b":"c"}
{"a":["b"]} | {"a":"c"} | {"a":"c"}
{"a":"c"} | {"a":["b"]} | {"a":["b"]}
{"a":{"b":"c"}} | {"a":{"b":"d","c":null}} | {"a":{"b":"d"}}
{"a":[{"b":"c"}]} | {"a":[1]} | {"a":[1]}
["a","b"] | ["c","d"] | ["c","d"]
{"a":"b"} | ["c"] | ["c"]
{"a":"foo"} | null | null
{"a":"foo"} | "bar" | "bar"
{"e":null} | {"a":1} | {"e":null,"a":1}
[1,2] | {"a":"b","c":null} | {"a":"b"}
{} | {"a":{"bb":{"ccc":null}}} | {"a":{"bb":{}}}
"""

KEYS = st.sampled_from(["a", "b", "語"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=3)


def without_nulls(value: Any) -> Any:
    """As a document that no patch could change by its nulls: those of objects, lists keep theirs."""
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}


class TestMergePatch:
    @pytest.mark.parametrize("example", EXAMPLES.strip().splitlines())
    def test_the_rfcs_examples(self, example: str) -> None:
        original, patch, result = (msgspec.json.decode(part.strip()) for part in example.split(" | "))
        assert merge_patch(original, patch) == result

    @given(VALUES, VALUES)
    def test_each_member_is_as_the_rfc_says(self, target: Any, patch: Any) -> None:
        merged = merge_patch(target, patch)
        if not isinstance(patch, dict):
            assert merged == patch
            return
        before = target if isinstance(target, dict) else {}
        for key in before.keys() | patch.keys():
            if key not in patch:
                assert merged[key] == before[key]
            elif patch[key] is None:
                assert key not in merged
            else:
                assert merged[key] == merge_patch(before.get(key), patch[key])
        assert merged.keys() <= before.keys() | patch.keys()

    @given(VALUES, VALUES)
    def test_a_second_time_changes_nothing(self, target: Any, patch: Any) -> None:
        once = merge_patch(target, patch)
        assert merge_patch(once, patch) == once

    @given(VALUES, VALUES)
    def test_what_went_in_stays_as_it_was(self, target: Any, patch: Any) -> None:
        target_before, patch_before = copy.deepcopy((target, patch))
        merge_patch(target, patch)
        assert (target, patch) == (target_before, patch_before)

    @given(OBJECTS)
    def test_on_nothing_it_is_the_patch_without_its_nulls(self, patch: dict[str, Any]) -> None:
        assert merge_patch({}, patch) == without_nulls(patch)


class TestDocument:
    @pytest.fixture
    def database(self) -> Iterator[Database]:
        opened = Database.open("sqlite://", inline=True)
        yield opened
        opened.close()

    async def patch(
        self, database: Database, patch: Any, settings: WorkingMemorySettings = SETTINGS
    ) -> WorkingMemoryChange:
        return await database.write(patch_document, ANN, settings, patch, NOW)

    async def test_tells_only_what_has_changed(self, database: Database) -> None:
        change = await self.patch(database, {"name": "", "likes": {"music": "jazz"}, "age": None})
        assert (change.set_keys, change.deleted_keys) == (("likes",), ())
        change = await self.patch(database, {"likes": {"music": None}, "name": None, "new": {}})
        assert (change.set_keys, change.deleted_keys) == (("likes", "new"), ("name",))
        assert change.document == {"likes": {}, "new": {}}

    async def test_one_and_true_are_two_values(self, database: Database) -> None:
        await self.patch(database, {"name": 1})
        assert (await self.patch(database, {"name": True})).set_keys == ("name",)

    async def test_the_template_itself_never_changes(self, database: Database) -> None:
        await self.patch(database, {"likes": {"music": "jazz"}, "name": "Ann"})
        assert SETTINGS.template == {"name": "", "likes": ["jazz"]}

    async def test_capacity_is_of_bytes_to_the_last_one(self, database: Database) -> None:
        room = SETTINGS.max_bytes - len(msgspec.json.encode(SETTINGS.template | {"a": ""}))
        words = "語" * (room // 3) + "x" * (room % 3)
        await self.patch(database, {"a": words})
        with pytest.raises(MemoryRefusedError, match="would be 101 bytes of JSON, and may be 100"):
            await self.patch(database, {"a": words + "x"})
        assert (await database.read(read_document, ANN, SETTINGS))["a"] == words

    async def test_a_full_one_can_be_emptied(self, database: Database) -> None:
        await self.patch(database, {"a": "x" * 60})
        smaller = WorkingMemorySettings(max_bytes=20)
        with pytest.raises(MemoryRefusedError):
            await self.patch(database, {"b": 1}, smaller)
        assert (await self.patch(database, {"a": None, "likes": None}, smaller)).document == {"name": ""}

    async def test_an_emptied_one_stays_empty(self, database: Database) -> None:
        await self.patch(database, {"name": None, "likes": None})
        assert await database.read(read_document, ANN, SETTINGS) == {}

    @pytest.mark.parametrize("patch", [[], "text", 1, None, True])
    async def test_only_objects_are_patches(self, database: Database, patch: Any) -> None:
        with pytest.raises(MemoryRefusedError, match="a JSON object"):
            await self.patch(database, patch)
        with pytest.raises(MemoryRefusedError, match="a JSON object"):
            await database.write(replace_document, ANN, SETTINGS, patch, NOW)

    @pytest.mark.parametrize("wrap", [lambda inner: {"a": inner}, lambda inner: [inner]])
    async def test_depth_is_bounded(self, database: Database, wrap: Any) -> None:
        large = WorkingMemorySettings(max_bytes=65_536)

        def nested(depth: int) -> dict[str, Any]:
            value: Any = 1
            for _ in range(depth - 1):
                value = wrap(value)
            return {"a": value}

        assert (await self.patch(database, nested(MAX_DEPTH), large)).document["a"] == nested(MAX_DEPTH)["a"]
        for depth in (MAX_DEPTH + 1, 10_000):
            with pytest.raises(MemoryRefusedError, match=f"at most {MAX_DEPTH}"):
                await self.patch(database, nested(depth), large)

    async def test_what_json_cannot_say_is_refused(self, database: Database) -> None:
        with pytest.raises(MemoryRefusedError, match="what JSON cannot say"):
            await self.patch(database, {"a": "\ud800"})

    async def test_is_replaced_whole(self, database: Database) -> None:
        change = await database.write(replace_document, ANN, SETTINGS, {"x": None, "name": ""}, NOW)
        assert (change.set_keys, change.deleted_keys) == (("x",), ("likes",))
        assert await database.read(read_document, ANN, SETTINGS) == {"x": None, "name": ""}
        with pytest.raises(MemoryRefusedError, match="may be 100"):
            await database.write(replace_document, ANN, SETTINGS, {"x": "y" * 100}, NOW)
