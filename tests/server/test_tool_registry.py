"""The names of tools in agents' records, and who has them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from engine.builtin_tools import BUILT_IN_TOOLS
from engine.function_tool import TOOL_NAME, FunctionTool, tool
from engine.provider import ToolSpec
from engine.tools import Tool, ToolContext, ToolResult
from server.tool_registry import (
    ENTRY_POINT_GROUP,
    ToolNameError,
    ToolPluginError,
    ToolRegistry,
    UnknownToolError,
    shown_name,
    tools_of,
)
from tests.engine.tool_contexts import make_context


class PlainTool:
    """A tool that is no function, as an MCP server's are."""

    def __init__(self, name: str, parameters: dict[str, Any] | None = None) -> None:
        self.spec = ToolSpec(name, f"does {name}", parameters or {"type": "object"})

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        return ToolResult(f"{self.spec.name} {arguments}")


class Server:
    """A source whose tools can change."""

    def __init__(self, *names: str) -> None:
        self.held: dict[str, Tool] = {name: PlainTool(name) for name in names}

    def tools(self) -> dict[str, Tool]:
        return self.held


class Plugins:
    """Entry points that give what they are told, and count how often they are loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.asked = 0
        self._points: list[EntryPoint] = []
        self._folder = tmp_path
        monkeypatch.syspath_prepend(tmp_path)

    def add(self, name: str, source: str) -> None:
        module = f"lumos_plugin_{name}"
        sys.modules.pop(module, None)
        (self._folder / f"{module}.py").write_text(source)
        self._points.append(EntryPoint(name, f"{module}:thing", ENTRY_POINT_GROUP))

    def __call__(self) -> Iterable[EntryPoint]:
        self.asked += 1
        return self._points


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plugins:
    return Plugins(monkeypatch, tmp_path)


ONE = "def {0}() -> int:\n    return 1\n"


def names_of(tools: Iterable[Tool]) -> list[str]:
    return [found.spec.name for found in tools]


def test_built_in_tools_are_found_in_order_and_once() -> None:
    found = ToolRegistry().find(["remember", "calculator", "remember"])
    assert found == (BUILT_IN_TOOLS["remember"], BUILT_IN_TOOLS["calculator"])
    assert ToolRegistry().find([]) == ()


def test_a_name_that_nobody_has_is_said_with_those_there_are() -> None:
    with pytest.raises(
        UnknownToolError, match=r"no tool 'calc'; there are: calculator, current_time, forget, "
    ) as error:
        ToolRegistry({"files": Server("read")}).find(["calculator", "calc"])
    assert error.value.name == "calc"
    assert error.value.known[-1] == "files.read"
    assert not isinstance(error.value, ToolPluginError)


async def test_an_entry_point_is_a_function_a_tool_or_several(plugins: Plugins) -> None:
    plugins.add("a", "def convert(amount: int) -> int:\n    return amount * 2\nthing = convert\n")
    plugins.add("b", "from engine.function_tool import tool\n@tool\nasync def thing() -> str:\n    return 'b'\n")
    plugins.add("c", ONE.format("one") + ONE.format("two") + "thing = [one, (x for x in [two])]\n")
    registry = ToolRegistry(plugins=plugins)
    found = registry.find(["two", "convert", "thing", "one"])
    assert names_of(found) == ["two", "convert", "thing", "one"]
    assert await found[1].call('{"amount": 4}', make_context()) == ToolResult(8)
    registry.find(["one"])
    assert plugins.asked == 1
    assert set(registry.names()) == {*BUILT_IN_TOOLS, "convert", "thing", "one", "two"}
    assert registry.plugin_errors() == {}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def broken(:", "SyntaxError"),
        ("other = 1", "AttributeError"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("thing = 5", "TypeError: a tool is made of a function or a method, not of 5"),
        ("thing = 'text'", "TypeError: a tool is made of a function"),
        ("def thing(x): ...", "TypeError: thing cannot be a tool: its parameter 'x' has no type hint"),
    ],
)
def test_a_broken_plugin_stops_only_those_that_want_what_nobody_has(plugins: Plugins, source: str, why: str) -> None:
    plugins.add("broken", source)
    plugins.add("sound", ONE.format("one") + "thing = one\n")
    registry = ToolRegistry(plugins=plugins)
    assert names_of(registry.find(["calculator", "one"])) == ["calculator", "one"]
    with pytest.raises(
        ToolPluginError, match=r"there is no tool 'two'; there are: .*one.*; of the group lumos.tools"
    ) as e:
        registry.find(["two"])
    assert "broken = lumos_plugin_broken:thing: " in str(e.value)
    assert why in str(e.value)
    assert list(registry.plugin_errors()) == ["broken = lumos_plugin_broken:thing"]


def test_a_name_that_two_have_is_an_error_when_it_is_wanted(plugins: Plugins) -> None:
    plugins.add("a", ONE.format("calculator") + ONE.format("one") + "thing = [calculator, one]\n")
    plugins.add("b", ONE.format("one") + "thing = one\n")
    registry = ToolRegistry(plugins=plugins)
    assert names_of(registry.find(["remember"])) == ["remember"]
    with pytest.raises(ToolNameError, match=r"several tools 'calculator': built in, in the entry point a = "):
        registry.find(["calculator"])
    with pytest.raises(ToolNameError, match=r"several tools 'one': in the entry point a = .*, in the entry point b = "):
        registry.find(["one"])


async def test_a_sources_tools_are_found_by_its_name_and_shown_without_a_dot() -> None:
    registry = ToolRegistry({"files": Server("write", "read"), "web": Server("get")})
    assert names_of(registry.find(["web.get", "files.*", "files.read"])) == ["web_get", "files_read", "files_write"]
    (read,) = registry.find(["files.read"])
    assert read.spec == ToolSpec("files_read", "does read", {"type": "object", "properties": {}, "required": []})
    assert await read.call("{}", make_context()) == ToolResult("read {}")


def test_a_source_is_asked_at_each_look_up() -> None:
    server = Server()
    registry = ToolRegistry({"files": server})
    assert registry.find(["files.*"]) == ()
    with pytest.raises(UnknownToolError, match=r"no tool 'files.read'; there are: none"):
        registry.find(["files.read"])
    server.held["read"] = PlainTool("read")
    assert names_of(registry.find(["files.read"])) == ["files_read"]
    with pytest.raises(UnknownToolError, match=r"no tool 'files.write'; there are: files.read$"):
        registry.find(["files.write"])


@pytest.mark.parametrize("name", ["web.get", "web.*", ".", ".read", "files.", "*", "files*", ""])
def test_names_of_nothing_are_unknown(name: str) -> None:
    with pytest.raises(UnknownToolError, match="there is no tool"):
        ToolRegistry({"files": Server("read")}).find([name])


def test_two_tools_that_the_model_would_see_as_one_are_an_error() -> None:
    registry = ToolRegistry({"a_b": Server("c"), "a": Server("b_c")})
    assert names_of(registry.find(["a_b.c"])) == ["a_b_c"]
    with pytest.raises(ToolNameError, match=r"both a_b\.c and a\.b_c as 'a_b_c'"):
        registry.find(["a_b.c", "a.b_c"])


@pytest.mark.parametrize("name", ["", "a.b", "1a", "é", "a" * 33, "a b"])
def test_a_source_that_could_not_be_named_is_refused(name: str) -> None:
    with pytest.raises(ToolNameError, match="no name for a source of tools"):
        ToolRegistry({name: Server()})


def test_shown_names_fit_and_stay_apart() -> None:
    assert shown_name("files", "read-all_2") == "files_read-all_2"
    shown = [shown_name("s", name) for name in ("a.b", "a/b", "a_b", "ü", "", "x" * 70, "x" * 71, "\ud800")]
    assert len(set(shown)) == len(shown)
    assert all(re.fullmatch(TOOL_NAME, name) for name in shown)


def test_a_sources_schema_is_made_digestible_or_refused() -> None:
    server = Server()
    server.held["good"] = PlainTool(
        "good",
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "array"}}},
    )
    server.held["bad"] = PlainTool("bad", {"type": "array"})
    registry = ToolRegistry({"files": server})
    (good,) = registry.find(["files.good"])
    assert good.spec.parameters["properties"] == {"a": {"type": "array", "items": {}}}
    with pytest.raises(ToolNameError, match=r"the tool files\.bad cannot be used: the schema is of 'array'"):
        registry.find(["files.bad"])


def test_one_bad_tool_of_a_source_costs_none_of_the_others_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    server = Server("read")
    server.held["bad"] = PlainTool("bad", {"type": "array"})
    registry = ToolRegistry({"files": server})
    for _ in range(2):
        assert names_of(registry.find(["files.*"])) == ["files_read"]
    assert [record.message for record in caplog.records] == [
        "tool files.bad is left out: the schema is of 'array', not of an object"
    ]
    server.held["bad"] = PlainTool("better")
    assert names_of(registry.find(["files.*"])) == ["files_bad", "files_read"]


def test_a_tool_that_stays_the_same_is_made_fit_once() -> None:
    server = Server("read")
    server.held["mute"] = PlainTool("mute")
    server.held["mute"].spec = ToolSpec("mute", "", {"type": "object"})  # type: ignore[misc]
    registry = ToolRegistry({"files": server})
    assert registry.find(["files.*"]) == registry.find(["files.*"])
    assert registry.find(["files.mute"])[0].spec.description == "files mute"


def test_what_an_entry_point_may_be() -> None:
    async def ping() -> None: ...

    made = tool(ping)
    plain = PlainTool("plain")
    assert list(tools_of([made, [plain]])) == [made, plain]
    (from_function,) = tools_of(ping)
    assert isinstance(from_function, FunctionTool)
    refused: list[tuple[Callable[[], Any] | object, type[Exception]]] = [
        (PlainTool("a.b"), ValueError),
        (PlainTool("a", {"type": "array"}), ValueError),
        ({"a": ping}, TypeError),
        (None, TypeError),
    ]
    for thing, error in refused:
        with pytest.raises(error):
            tools_of(thing)


def test_the_installed_entry_points_are_looked_at_by_default() -> None:
    assert ToolRegistry().plugin_errors() == {}
