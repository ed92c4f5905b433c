"""Functions as tools: what the model sees of them, the decoding of what it writes, and their results."""

from __future__ import annotations

import enum
import functools
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from engine.function_tool import FunctionTool, tool
from engine.tool_threads import run_inline
from engine.tools import ToolContext, ToolError, ToolResult

from .tool_contexts import make_context


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


class Place(msgspec.Struct):
    """A place on earth."""

    name: str
    country: str = "CH"


class Town(msgspec.Struct):
    name: str


@dataclass
class Span:
    first: int
    last: int = 9
    steps: list[int] = field(default_factory=list)


class Options(TypedDict, total=False):
    colour: Literal["red", "blue"]


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

    def __repr__(self) -> str:
        return "Opaque()"


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
def takes_structs(x: Place | Town) -> None: ...
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
