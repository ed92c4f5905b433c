"""Schemas of tools in the words that every vendor reads, and docstrings."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from msgspec import Meta

from engine.docstrings import read_docstring
from engine.function_tool import tool
from engine.tool_schema import digestible
from engine.tools import ToolResult

from .tool_contexts import make_context


class Place(msgspec.Struct):
    """A place on earth."""

    name: str
    country: str = "CH"


class Tree(msgspec.Struct):
    label: str
    children: list[Tree] = []


async def test_types_that_contain_themselves_keep_their_reference_and_others_are_inlined() -> None:
    @tool
    async def plant(tree: Tree, at: Annotated[Place, Meta(description="Where.")], again: Place | None = None) -> str:
        return tree.children[0].label

    schema = plant.spec.parameters
    assert schema["properties"]["tree"] == {"$ref": "#/$defs/Tree"}
    assert set(schema["$defs"]) == {"Tree"}
    place = {
        "type": "object",
        "description": "Where.",
        "properties": {"name": {"type": "string"}, "country": {"type": "string", "default": "CH"}},
        "required": ["name"],
    }
    assert schema["properties"]["at"] == place
    assert schema["properties"]["again"]["anyOf"][0] == {**place, "description": "A place on earth."}
    arguments = {"tree": {"label": "a", "children": [{"label": "b"}]}, "at": {"name": "Bern"}}
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(arguments)
    assert await plant.call(json.dumps(arguments), make_context()) == ToolResult("b")


class Circle(msgspec.Struct, tag="circle"):
    radius: float


class Square(msgspec.Struct, tag="square"):
    side: float


def test_only_words_that_every_vendor_reads_are_left() -> None:
    @tool
    async def draw(
        shape: Circle | Square,
        pair: tuple[int, str],
        any_list: list[Any],
        counts: dict[str, int],
        kind: Literal["x"],
        level: Literal[1, 2],
        title: str,
    ) -> None: ...

    schema = draw.spec.parameters
    text = json.dumps(schema)
    for word in ("$ref", "$defs", "prefixItems", "const", "discriminator", '"additionalProperties": false'):
        assert word not in text
    properties = schema["properties"]
    assert properties["title"] == {"type": "string"}
    assert properties["pair"]["items"] == {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    assert properties["any_list"] == {"type": "array", "items": {}}
    assert properties["counts"] == {"type": "object", "additionalProperties": {"type": "integer"}}
    assert properties["kind"] == {"type": "string", "enum": ["x"]}
    assert properties["level"] == {"type": "integer", "enum": [1, 2]}
    assert properties["shape"]["anyOf"][0]["properties"]["type"] == {"type": "string", "enum": ["circle"]}


def test_schemas_of_others_are_made_digestible() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "readArguments",
        "type": "object",
        "properties": {
            "title": {"title": "Title", "const": "a", "default": {"title": "kept"}},
            "default": {"$ref": "#/definitions/Mode", "description": "How."},
            "rest": {"type": "array", "items": True},
        },
        "definitions": {"Mode": {"title": "Mode", "enum": ["r", "w"]}, "Unused": {"type": "string"}},
        "additionalProperties": False,
    }
    assert digestible(schema) == {
        "type": "object",
        "properties": {
            "title": {"type": "string", "enum": ["a"], "default": {"title": "kept"}},
            "default": {"type": "string", "enum": ["r", "w"], "description": "How."},
            "rest": {"type": "array", "items": {}},
        },
        "required": [],
    }


def test_a_schema_that_doubles_at_each_level_keeps_its_references() -> None:
    levels = {
        f"L{n}": {"type": "object", "properties": {s: {"$ref": f"#/$defs/L{n + 1}"} for s in "ab"}} for n in range(40)
    }
    schema = {"$ref": "#/$defs/L0", "$defs": {**levels, "L40": {"type": "string"}}}
    result = digestible(schema)
    assert result["type"] == "object"
    assert len(result["$defs"]) == 40
    assert len(json.dumps(result)) < 10_000
    Draft202012Validator(result).validate({"a": {"b": {}}})


def nested_lists(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "string"}, "of 'string', not of an object"),
        ({"properties": {"a": {"$ref": "#/$defs/Nowhere"}}}, "refers to '#/\\$defs/Nowhere'"),
        ({"$ref": "https://example.com/schema"}, "refers to 'https"),
        (nested_lists(5000), "nested too deeply"),
    ],
    ids=["no object", "no such definition", "elsewhere", "deep"],
)
def test_a_schema_that_cannot_be_used_is_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        digestible(schema)


def test_a_schema_that_refers_to_itself_at_the_top_is_an_object() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}
    result = digestible({"$ref": "#/$defs/Node", "$defs": {"Node": node}})
    assert (result["type"], result["properties"]) == ("object", node["properties"])
    Draft202012Validator(result).validate({"next": {"next": {}}})


def test_docstrings_of_other_shapes() -> None:
    assert read_docstring(None) == ("", {})
    assert read_docstring("One line.") == ("One line.", {})
    text, entries = read_docstring(
        """Does it.

        Arguments:
          a: first: with a colon
          **b (dict[str, int]): second

            its next paragraph

        A list:
        - one
        - two
        """
    )
    assert text == "Does it.\n\nA list:\n- one\n- two"
    assert entries == {"a": "first: with a colon", "b": "second its next paragraph"}
