"""JSON Schemas of tools' arguments in a form that the vendors take.

Each vendor reads its own part of JSON Schema, and one tool that it cannot read fails the whole request: OpenAI refuses
arrays without ``items``; Gemini and many local servers know no ``$ref``, ``const`` or ``prefixItems``; strict modes
want a type beside ``enum``. What comes out of here is self-contained and uses little but ``type``, ``properties``,
``required``, ``items``, ``enum``, ``anyOf``, ``description``, ``default`` and the limits of numbers, texts and lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_NODES = 2000
"""Schemas inside one schema, after references are resolved; beyond it they stay references."""

_DROPPED = frozenset({"title", "$schema", "$id", "$comment", "discriminator", "$defs", "definitions"})
_ONE = frozenset({"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"})
_MANY = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas"})
_TYPE_NAMES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def digestible(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object as a self-contained one of the same meaning, near enough for a model.

    References are resolved; those of types that contain themselves stay, with their ``$defs``. It may take a little
    more than the original (unknown fields, tuples in another order): whoever decodes the arguments still checks.

    Raises:
        ValueError: it is nested too deeply, refers to what is not in it, or describes no object.
    """
    try:
        try:
            result = _Digestion(schema, inline=True).result()
        except _TooManyNodesError:
            result = _Digestion(schema, inline=False).result()
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None
    if result.setdefault("type", "object") != "object":
        raise ValueError(f"the schema is of {result['type']!r}, not of an object")
    result.setdefault("properties", {})
    result.setdefault("required", [])
    return result


class _TooManyNodesError(Exception):
    """Resolving all references would make the schema too large (each level may double it)."""


class _Digestion:
    """One schema being rewritten."""

    def __init__(self, schema: Mapping[str, Any], *, inline: bool) -> None:
        self._schema = schema
        self._definitions: dict[str, Any] = {**schema.get("definitions", {}), **schema.get("$defs", {})}
        self._kept: dict[str, Any] = {}
        self._recursive: dict[str, bool] = {}
        self._nodes = 0
        self._inline = inline

    def result(self) -> dict[str, Any]:
        root = dict(self._schema)
        if "$ref" in root:  # an object, whether it contains itself or not
            root = {**self._definition(root.pop("$ref"))[1], **root}
        result = self._node(root)
        return {**result, "$defs": self._kept} if self._kept else result

    def _node(self, node: Any) -> dict[str, Any]:
        if not isinstance(node, Mapping):  # true and false are schemas too
            return {}
        self._nodes += 1
        if self._inline and self._nodes > MAX_NODES:
            raise _TooManyNodesError
        if "$ref" in node:
            return self._reference(node)
        result = {key: self._keyword(key, value) for key, value in node.items() if key not in _DROPPED}
        return _simplified(result)

    def _keyword(self, key: str, value: Any) -> Any:
        if key in _NAMED and isinstance(value, Mapping):
            return {name: self._node(part) for name, part in value.items()}
        if key in _MANY and isinstance(value, list):
            return [self._node(part) for part in value]
        if key in _ONE and not isinstance(value, bool):
            return self._node(value)
        return value

    def _reference(self, node: Mapping[str, Any]) -> dict[str, Any]:
        name, definition = self._definition(node["$ref"])
        beside = {key: value for key, value in node.items() if key != "$ref"}
        if self._inline and not self._contains_itself(name):
            return self._node({**definition, **beside})
        if name not in self._kept:
            self._kept[name] = {}  # entered before its contents, which refer to it
            self._kept[name] = self._node(definition)
        return {"$ref": f"#/$defs/{name}", **self._node(beside)}

    def _definition(self, reference: Any) -> tuple[str, Mapping[str, Any]]:
        name = _name(str(reference))
        definition = self._definitions.get(name)
        if not isinstance(definition, Mapping):
            raise ValueError(f"the schema refers to {str(reference)[:100]!r}, which is not in it")
        return name, definition

    def _contains_itself(self, name: str) -> bool:
        if name not in self._recursive:
            found: set[str] = set()
            waiting = [name]
            while waiting:
                for reference in _references(self._definitions.get(waiting.pop())):
                    inner = _name(reference)
                    if inner not in found:
                        found.add(inner)
                        waiting.append(inner)
            self._recursive[name] = name in found
        return self._recursive[name]


def _name(reference: str) -> str:
    return reference.removeprefix("#/$defs/").removeprefix("#/definitions/")


def _references(node: Any) -> Iterator[str]:
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            if isinstance(part.get("$ref"), str):
                yield part["$ref"]
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _simplified(node: dict[str, Any]) -> dict[str, Any]:
    """The node without what some vendors refuse, its parts being simplified already."""
    if node.get("additionalProperties") is False:  # refused by some; unknown fields are refused when decoding
        del node["additionalProperties"]
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "enum" in node and "type" not in node:
        kinds = {type(value) for value in node["enum"]}
        if len(kinds) == 1 and (kind := kinds.pop()) in _TYPE_NAMES:
            node = {"type": _TYPE_NAMES[kind], **node}
    if "prefixItems" in node:
        kinds_of_items = []
        for item in node.pop("prefixItems"):
            if item not in kinds_of_items:
                kinds_of_items.append(item)
        node["items"] = kinds_of_items[0] if len(kinds_of_items) == 1 else {"anyOf": kinds_of_items}
    if node.get("type") == "array" and not isinstance(node.get("items"), dict):
        node["items"] = {}
    return node
