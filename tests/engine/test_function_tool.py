"""Functions as tools: their schemas, the decoding of what models write, and the threads of those that block."""

from __future__ import annotations

import enum
import functools
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from msgspec import Meta

from engine.docstrings import read_docstring
from engine.function_tool import FunctionTool, tool
from engine.tool_schema import digestible
from engine.tool_threads import ToolThreads, run_inline
from engine.tools import ToolContext, ToolError, ToolResult

from .tool_contexts import make_context


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


class Place(msgspec.Struct):
    """A place on earth."""

    name: str
    country: str = "CH"


@dataclass
class Span:
    first: int
    last: int = 9
    steps: list[int] = field(default_factory=list)


class Options(TypedDict, total=False):
    colour: Literal["red", "blue"]


class Tree(msgspec.Struct):
    label: str
    children: list[Tree] = []


@tool
async def weather(
    place: str,
    unit: Unit = Unit.CELSIUS,
    days: Annotated[int, Meta(ge=1, le=14, description="How far to look ahead.")] = 3,
    *,
    tags: list[str] | None = None,
) -> dict[str, Any]:
    """Tells the weather.

    It knows every place
    on earth.

    Args:
        place (str): A town,
            or a village.
        unit: Of the temperature.
        days: Not this one.

    Returns:
        What the weather is.

    Raises:
        OSError: never shown to a model.
    """
    return {"place": place, "unit": unit, "days": days, "tags": tags}


async def call(tool: FunctionTool, arguments: str = "", context: ToolContext | None = None) -> ToolResult:
    return await tool.call(arguments, context or make_context())


def inline(function: Callable[..., Any]) -> FunctionTool:
    return tool(run_sync=run_inline)(function)


def test_the_signature_and_the_docstring_are_all_that_a_model_sees() -> None:
    assert weather.spec.name == "weather"
    assert weather.spec.description == (
        "Tells the weather.\n\nIt knows every place on earth.\n\nReturns:\n    What the weather is."
    )
    assert weather.spec.parameters == {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "A town, or a village."},
            "unit": {"type": "string", "enum": ["c", "f"], "description": "Of the temperature.", "default": "c"},
            "days": {
                "type": "integer",
                "minimum": 1,
                "maximum": 14,
                "description": "How far to look ahead.",
                "default": 3,
            },
            "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}], "default": None},
        },
        "required": ["place"],
    }


async def test_arguments_come_as_their_types_and_defaults_are_the_functions_own() -> None:
    seen: list[Any] = []

    @tool
    async def look(place: Place, span: Span, options: Options, limit: float = 2, tags: list[str] = ["own"]) -> None:  # noqa: B006
        seen.append((place, span, options, limit, tags))

    result = await call(look, '{"place": {"name": "Bern"}, "span": {"first": 1}, "options": {"colour": "red"}}')
    assert result == ToolResult(None)
    assert seen == [(Place("Bern"), Span(1), {"colour": "red"}, 2, ["own"])]


async def test_a_name_and_a_description_can_be_given() -> None:
    @tool(name="get-it", description="Gets it.")
    async def get(self_: int = 0, p0: int = 1, __struct_fields__: int = 2) -> int:
        return p0 + __struct_fields__

    assert (get.spec.name, get.spec.description) == ("get-it", "Gets it.")
    assert await call(get, '{"p0": 3, "__struct_fields__": 4}') == ToolResult(7)
    assert await get.function(p0=5) == 7


async def test_without_a_docstring_the_name_describes() -> None:
    async def send_mail() -> None: ...

    assert tool(send_mail).spec.description == "send mail"
    assert tool(send_mail).spec.parameters == {"type": "object", "properties": {}, "required": []}


async def test_the_context_is_passed_and_not_shown() -> None:
    @tool
    async def who(context: ToolContext, other: ToolContext | None = None) -> str:
        assert context is other
        return context.run_id

    assert who.spec.parameters["properties"] == {}
    assert await call(who) == ToolResult("run-1")


async def test_methods_and_wrapped_coroutine_functions_are_tools() -> None:
    class Shop:
        price = 3

        async def cost(self, count: int) -> int:
            """What so many cost."""
            return self.price * count

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(**arguments: Any) -> Any:
            return function(**arguments)

        return wrapper

    assert await call(tool(Shop().cost), '{"count": 2}') == ToolResult(6)
    assert await call(tool(logged(Shop().cost)), '{"count": 2}') == ToolResult(6)


@pytest.mark.parametrize("text", ["", "  \n", "{}", "null"])
async def test_no_arguments_at_all_are_an_empty_object(text: str) -> None:
    @tool
    async def ping(count: int = 1) -> int:
        return count

    assert await call(ping, text) == ToolResult(1)


FIELDS = "the fields are: place (required), unit, days, tags"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            '{"place": 5}',
            'got `int` - at `place`; `place` is to fit {"description":"A town, or a village.","type":"string"}; ',
        ),
        ("{}", "Object missing required field `place`; `place` is to fit "),
        ('{"place": "x", "day": 3}', f"Object contains unknown field `day`; {FIELDS}"),
        ('{"place": "x", "days": 15}', "Expected `int` <= 14 - at `days`; `days` is to fit "),
        ('{"place": "x", "days": 1.5}', "Expected `int`, got `float` - at `days`"),
        ('{"place": "x", "unit": "k"}', "Invalid enum value 'k' - at `unit`"),
        ('{"place": "x", "tags": ["a", 1]}', "Expected `str`, got `int` - at `tags[1]`"),
        ('{"place": "x", "days": ' + "9" * 5000 + "}", "Integer value out of range - at `days`"),
        ('{"place": "x", "days": NaN}', "no valid JSON object: JSON is malformed: invalid character"),
        ('{"place": "\ud800"}', "the text has half of a surrogate pair in it"),
        ('{"place": "\\ud800"}', "no valid JSON object: "),
        ('{"place": "x', "no valid JSON object: Input data was truncated"),
        ('{"place": "x"} or so', "no valid JSON object: "),
        ('["x"]', f"Expected `object`, got `array`; {FIELDS}"),
        ('"x"', "Expected `object`, got `str`"),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_bad_arguments_are_answered_with_what_would_fit(arguments: str, text: str) -> None:
    result = await call(weather, arguments)
    assert result.failed
    assert text.lower() in result.value.lower()
    assert result.value.startswith("bad arguments: ")
    assert FIELDS in result.value
    assert len(result.value.encode()) < 3000


async def test_a_tool_without_fields_says_so() -> None:
    @tool
    async def ping() -> None: ...

    assert (await call(ping, '{"x": 1}')).value == (
        "bad arguments: Object contains unknown field `x`; there are no fields: write {}"
    )


async def test_deeply_nested_values_are_no_crash_where_anything_goes() -> None:
    @tool
    async def keep(value: Any) -> Any:
        return value

    assert "nested too deeply" in (await call(keep, '{"value": ' + "[" * 100_000)).value
    assert (await call(keep, '{"value": 1e999}')).failed
    assert await call(keep, '{"value": 123456789012345678901234567890}') == ToolResult(123456789012345678901234567890)


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_arguments_whatever_raise(text: str) -> None:
    async def main() -> ToolResult:
        return await call(weather, text)

    assert isinstance(trio.run(main), ToolResult)


class Opaque:
    def __str__(self) -> str:
        return "opaque"


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        (None, None),
        ("text", "text"),
        (Place("Bern"), {"name": "Bern", "country": "CH"}),
        (Span(1, 2), {"first": 1, "last": 2, "steps": []}),
        ([Unit.CELSIUS, (1, 2)], ["c", (1, 2)]),
        ({1: "a"}, {"1": "a"}),
        (Opaque(), "opaque"),
        ([Opaque()], ["opaque"]),
        (CYCLE, "[[...]]"),
        ({None: 1}, "{None: 1}"),
        (["\ud800"], "['\\ud800']"),
        (ToolResult("sorry", failed=True), ToolResult("sorry", failed=True)),
    ],
    ids=ascii,
)
async def test_whatever_is_returned_becomes_plain_values_or_text(returned: Any, value: Any) -> None:
    async def give() -> Any:
        return returned

    def give_at_once() -> Any:
        return returned

    expected = value if isinstance(value, ToolResult) else ToolResult(value)
    assert await call(tool(give)) == expected
    assert await call(inline(give_at_once)) == expected


async def test_what_the_function_raises_passes_but_leaving_the_program() -> None:
    def fail(kind: Literal["value", "exit", "error"]) -> None:
        raise {"value": ValueError("no"), "exit": SystemExit(2), "error": ToolError("not today")}[kind]

    with pytest.raises(ValueError, match="no"):
        await call(inline(fail), '{"kind": "value"}')
    with pytest.raises(ToolError, match="not today"):
        await call(inline(fail), '{"kind": "error"}')
    with pytest.raises(ToolError, match=r"tried to end the program \(2\)"):
        await call(inline(fail), '{"kind": "exit"}')


# Refused when made


def takes_any(*args: int) -> None: ...
def takes_options(**options: int) -> None: ...
def takes_position(x: int, /) -> None: ...
def takes_unhinted(x) -> None: ...  # type: ignore[no-untyped-def]
def takes_missing(x: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def takes_socket(x: socket.socket) -> None: ...
def takes_structs(x: Place | Tree) -> None: ...
def takes_greek(λ: int) -> None: ...  # noqa: PLC2401
def generates() -> Iterator[int]:
    yield 1


async def generates_async() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (takes_any, "parameter 'args' takes any number"),
        (takes_options, "parameter 'options' takes any number"),
        (takes_position, "parameter 'x' is positional-only"),
        (takes_unhinted, "parameter 'x' has no type hint"),
        (takes_missing, "type hints cannot be read .*Nowhere"),
        (takes_socket, "parameter 'x' is hinted .*socket.* cannot be read from JSON"),
        (takes_structs, "parameter 'x' is hinted .* cannot be read from JSON: .*must be tagged"),
        (takes_greek, "parameter 'λ' is not named in ASCII"),
        (generates, "is a generator"),
        (generates_async, "is a generator"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_by_name(function: Callable[..., Any], why: str) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__} cannot be a tool.*{why}"):
        tool(function)


def test_other_callables_and_names_that_vendors_refuse_are_refused() -> None:
    with pytest.raises(TypeError, match="made of a function"):
        tool(functools.partial(takes_any))
    for name in ("", "files.read", "1st", "a" * 65, "naïve", "a\n"):
        with pytest.raises(ValueError, match="not a tool's name"):
            tool(name=name)(generates_nothing)


def generates_nothing() -> None: ...


# Schemas


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
    assert await call(plant, json.dumps(arguments)) == ToolResult("b")


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


# Threads


async def test_a_sync_function_runs_in_a_thread_of_the_tools_own() -> None:
    threads = ToolThreads()

    @tool(run_sync=threads.run)
    def where(context: ToolContext) -> list[Any]:
        default = trio.from_thread.run_sync(trio.to_thread.current_default_thread_limiter).borrowed_tokens
        return [threading.current_thread() is threading.main_thread(), default]

    assert await call(where) == ToolResult([False, 0])
    assert threads.limiter().borrowed_tokens == 0
    assert threads.abandoned == 0


async def test_an_exception_in_the_thread_passes() -> None:
    @tool
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await call(fail)


class HangingTool:
    """A sync tool whose calls hang until they are let go, and that tells how many have begun."""

    def __init__(self, threads: ToolThreads) -> None:
        self.release = threading.Event()
        self._begun = threading.Semaphore(0)

        @tool(run_sync=threads.run)
        def hang() -> str:
            self._begun.release()
            self.release.wait(50)
            return "late"

        self.tool = hang

    async def begin(self, nursery: trio.Nursery, calls: int) -> None:
        for _ in range(calls):
            nursery.start_soon(call, self.tool)
        for _ in range(calls):
            await trio.to_thread.run_sync(self._begun.acquire)


async def all_threads_ended(threads: ToolThreads) -> None:
    """Returns when every place of the limiter is free: a place is given back when its thread has ended."""
    limiter = threads.limiter()
    for place in range(int(limiter.total_tokens)):
        await limiter.acquire_on_behalf_of(place)
    for place in range(int(limiter.total_tokens)):
        limiter.release_on_behalf_of(place)


async def test_t1_forty_hung_tool_threads_stop_nobody_else() -> None:
    threads = ToolThreads()
    hanging = HangingTool(threads)
    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 40)
        nursery.cancel_scope.cancel()
    try:
        assert threads.abandoned == 40
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        assert await trio.socket.getaddrinfo("localhost", 80)
        assert await trio.Path(__file__).exists()
        refused = await call(hanging.tool)
        assert refused.failed
        assert refused.value.startswith("not called: 40 earlier calls of tools that ran out of time are still running")
    finally:
        hanging.release.set()
    await all_threads_ended(threads)
    assert threads.abandoned == 0
    assert await call(hanging.tool) == ToolResult("late")


async def test_below_the_ceiling_there_is_a_thread_for_the_next_call() -> None:
    threads = ToolThreads(threads=3, max_abandoned=2)
    hanging = HangingTool(threads)

    @tool(run_sync=threads.run)
    def quick() -> int:
        return 1

    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 1)
        nursery.cancel_scope.cancel()
    assert await call(quick) == ToolResult(1)
    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 1)
        nursery.cancel_scope.cancel()
    assert (await call(quick)).failed
    hanging.release.set()
    await all_threads_ended(threads)
    assert await call(quick) == ToolResult(1)


async def test_a_call_that_is_cancelled_before_its_thread_begins_is_never_made() -> None:
    threads = ToolThreads(threads=2, max_abandoned=1)
    hanging = HangingTool(threads)
    made: list[int] = []

    @tool(run_sync=threads.run)
    def note() -> None:
        made.append(1)

    async with trio.open_nursery() as nursery:
        await hanging.begin(nursery, 2)
        with trio.CancelScope() as impatient:
            impatient.cancel()
            await call(note)
        assert impatient.cancelled_caught
        hanging.release.set()
    await all_threads_ended(threads)
    assert (made, threads.abandoned) == ([], 0)


def test_threads_that_outlive_their_trio_run_are_counted_on_and_hold_no_place_in_the_next() -> None:
    threads = ToolThreads(threads=2, max_abandoned=1)
    hanging = HangingTool(threads)

    async def abandon() -> None:
        async with trio.open_nursery() as nursery:
            await hanging.begin(nursery, 1)
            nursery.cancel_scope.cancel()

    async def look() -> tuple[bool, int]:
        return (await call(hanging.tool)).failed, threads.limiter().borrowed_tokens

    trio.run(abandon)
    assert trio.run(look) == (True, 0)
    hanging.release.set()


def test_limits_that_could_starve_are_refused() -> None:
    with pytest.raises(ValueError, match="less than threads"):
        ToolThreads(threads=4, max_abandoned=4)


async def test_cancelling_an_async_tool_cancels_it(autojump_clock: trio.testing.MockClock) -> None:
    @tool
    async def wait() -> None:
        await trio.sleep(50)

    with trio.move_on_after(2) as scope:
        await call(wait)
    assert (scope.cancelled_caught, trio.current_time()) == (True, 2)


async def test_inline_a_sync_tool_runs_on_the_virtual_clock(autojump_clock: trio.testing.MockClock) -> None:
    assert await call(inline(doubled), '{"x": 2}') == ToolResult(4)


def doubled(x: int) -> int:
    return x * 2


async def test_the_example_of_the_docs_does_what_they_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    convert = names["convert"]
    assert json.dumps(convert.spec.parameters, indent=2) in page
    assert await call(convert, '{"amount": 10, "to": "CHF"}') == ToolResult({"amount": 9.3, "currency": "CHF"})
    refused = await call(convert, '{"amount": "10", "to": "CHF"}')
    assert refused.failed
    assert refused.value in page
