"""A plan as text: Python to paste into a test, or JSON to keep; of both only what differs from the defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct

from .plan import Plan

_WIDTH = 120
_INDENT = 4


def paste_of(plan: Plan) -> str:
    """A test to paste, formatted as ours are: it passes once the plan goes well."""
    lines = [
        "from __future__ import annotations\n",
        _import_line(sorted(_names(plan))),
        "from server.simulation.run_plan import simulate\n\n",
        f"def test_seed_{plan.seed}() -> None:",
        f"    plan = {code_of(plan, column=11, indent=4)}",
        "    assert simulate(plan).violations == []",
    ]
    return "\n".join(lines) + "\n"


def code_of(value: Any, column: int = 0, indent: int = 0) -> str:
    """The expression that makes the value. It begins in that column of a line with that indentation; a comma counts."""
    flat = _flat(value)
    if column + len(flat) <= _WIDTH or not isinstance(value, Struct | tuple):
        return flat
    inner = indent + _INDENT
    outer = " " * indent
    if isinstance(value, tuple):
        items = [code_of(item, inner + 1, inner) for item in value]
        return "(\n" + "".join(f"{outer}    {item},\n" for item in items) + f"{outer})"
    name = type(value).__name__
    hugged = flat.removeprefix(f"{name}(").removesuffix(")")
    if inner + len(hugged) <= _WIDTH:
        return f"{name}(\n{outer}    {hugged}\n{outer})"
    fields = [f"{field}={code_of(item, inner + len(field) + 2, inner)}" for field, item in non_defaults(value)]
    return f"{name}(\n" + "".join(f"{outer}    {field},\n" for field in fields) + f"{outer})"


def json_of(plan: Plan) -> str:
    """The plan as JSON, indented."""
    return json.dumps(_data(plan), indent=2, ensure_ascii=False) + "\n"


def plan_of_json(text: str | bytes) -> Plan:
    """What ``json_of`` made.

    Raises:
        msgspec.DecodeError: it is no plan.
    """
    return msgspec.json.decode(text, type=Plan)


def non_defaults(value: Struct) -> Iterator[tuple[str, Any]]:
    """The fields that are not as they would be by themselves."""
    for field in msgspec.structs.fields(value):
        current = getattr(value, field.name)
        if field.default is NODEFAULT or current != field.default:
            yield field.name, current


def _flat(value: Any) -> str:
    match value:
        case Struct():
            fields = ", ".join(f"{name}={_flat(item)}" for name, item in non_defaults(value))
            return f"{type(value).__name__}({fields})"
        case tuple():
            return f"({', '.join(map(_flat, value))}{',' * (len(value) == 1)})"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return repr(value)


def _names(value: Any) -> set[str]:
    match value:
        case Struct():
            return {type(value).__name__}.union(*(_names(item) for _, item in non_defaults(value)))
        case tuple():
            return set().union(*map(_names, value))
        case _:
            return set()


def _import_line(names: list[str]) -> str:
    line = f"from server.simulation.plan import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return line
    return "from server.simulation.plan import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _data(value: Any) -> Any:
    match value:
        case Struct():
            return {name: _data(item) for name, item in non_defaults(value)}
        case tuple():
            return [_data(item) for item in value]
        case _:
            return value
