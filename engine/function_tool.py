"""Makes tools of Python functions: the signature and the docstring are all that there is to write."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, overload

import msgspec

from .docstrings import read_docstring
from .provider import ToolSpec
from .tool_schema import digestible
from .tool_threads import TOOL_THREADS, RunSync, TooManyAbandonedError
from .tools import ToolContext, ToolError, ToolResult

TOOL_NAME = r"[A-Za-z_][A-Za-z0-9_-]{0,63}"
"""What every vendor takes as the name of a tool."""

MAX_TEXT_CHARS = 1000

_TOOL_NAME = re.compile(TOOL_NAME)
_PARAMETER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MISSING_OR_UNKNOWN = re.compile(r"(?:missing required|unknown) field `([^`]+)`$")
_PLACE = re.compile(r"at `(?:key in )?\$\.([^`.\[]+)")


class FunctionTool:
    """A function as a tool. Made by ``tool``.

    Attributes:
        function: the function, to be called as ever.
    """

    def __init__(self, function: Callable[..., Any], spec: ToolSpec, arguments: _Arguments, run_sync: RunSync) -> None:
        self.function = function
        self._spec = spec
        self._arguments = arguments
        self._run_sync = run_sync
        # A decorator around an async function may be a plain function that gives the other's coroutine.
        self._is_async = any(inspect.iscoroutinefunction(f) for f in (function, inspect.unwrap(function)))

    def __repr__(self) -> str:
        return f"<tool {self._spec.name}>"

    @property
    def spec(self) -> ToolSpec:
        """How the model sees it."""
        return self._spec

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the function: where it is, if it is async, else in a thread that is given up on when cancelled.

        Arguments that do not fit give a failed result that says what would. What the function raises passes.
        """
        try:
            supplied = self._arguments.decode(arguments)
        except _BadArgumentsError as refusal:
            return ToolResult(str(refusal), failed=True)
        call = partial(self.function, **supplied, **dict.fromkeys(self._arguments.context_names, context))
        try:
            if self._is_async:
                return _as_result(await call())
            return typing.cast(ToolResult, await self._run_sync(lambda: _as_result(call())))
        except TooManyAbandonedError as refusal:
            return ToolResult(str(refusal), failed=True)
        except SystemExit as leaving:  # of a command-line parser, say: not for a tool to decide
            raise ToolError(f"the tool tried to end the program ({leaving})") from leaving


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...


@overload
def tool(
    *, name: str | None = None, description: str | None = None, run_sync: RunSync = TOOL_THREADS.run
) -> Callable[[Callable[..., Any]], FunctionTool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    run_sync: RunSync = TOOL_THREADS.run,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Make a tool of an async or a sync function: ``tool(function)``, ``@tool`` or ``@tool(name="…")``.

    The parameters' type hints become the schema and are enforced; ``Annotated[…, msgspec.Meta(…)]`` adds limits and a
    description, and so does the docstring's ``Args:``. A parameter hinted ``ToolContext`` gets the context and is not
    shown to the model.

    Args:
        function: takes its arguments by name; returns what can be JSON, a ``ToolResult``, or anything else (as text).
        name: what the model calls it; the function's name if None.
        description: for the model; the docstring if None.
        run_sync: runs a function that is not async; by default in a thread of the tools' own.

    Raises:
        TypeError: the function cannot be a tool; says which parameter is why.
        ValueError: the name is not one that vendors take.
    """
    if function is None:
        return lambda function: _make(function, name, description, run_sync)
    return _make(function, name, description, run_sync)


def _make(function: Callable[..., Any], name: str | None, description: str | None, run_sync: RunSync) -> FunctionTool:
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise TypeError(f"a tool is made of a function or a method, not of {function!r}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{function.__qualname__} cannot be a tool: it is a generator; return a list instead")
    name = function.__name__ if name is None else name
    if not _TOOL_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a tool's name: up to 64 letters, digits, _ and -, beginning with a letter or _"
        )
    text, entries = read_docstring(function.__doc__)
    arguments = _Arguments(function, entries)
    spec = ToolSpec(name, description or text or name.replace("_", " "), arguments.schema)
    return FunctionTool(function, spec, arguments, run_sync)


class _BadArgumentsError(Exception):
    """The model's arguments do not fit; the text says to the model what would."""


class _Arguments:
    """A function's parameters as the model writes them: their schema, and the decoding of their JSON.

    Defaults are left to the function: a parameter that the model leaves out is not passed.
    """

    def __init__(self, function: Callable[..., Any], descriptions: dict[str, str]) -> None:
        hints = _hints(function)
        self.context_names: list[str] = []
        self._names: dict[str, str] = {}  # of the struct's fields, which are named so that none can clash
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        defaults: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            hint = _hint_of(function, parameter, hints)
            if hint is ToolContext or hint == ToolContext | None:
                self.context_names.append(parameter.name)
                continue
            field = f"p{len(fields)}"
            self._names[field] = parameter.name
            hint = _described(hint, descriptions.get(parameter.name))
            if parameter.default is parameter.empty:
                fields.append((field, hint))
            else:
                fields.append((field, hint, msgspec.field(default_factory=_unset)))
                defaults[parameter.name] = parameter.default
        struct = msgspec.defstruct("Arguments", fields, rename=self._names, kw_only=True, forbid_unknown_fields=True)
        self._decoder = msgspec.json.Decoder(struct)
        self.schema = _schema(struct, defaults)

    def decode(self, text: str) -> dict[str, Any]:
        """The arguments by name; raises _BadArgumentsError."""
        try:
            decoded = self._decoder.decode("{}" if text.strip() in ("", "null") else text)
        except msgspec.ValidationError as error:
            raise _BadArgumentsError(self._explain(str(error))) from None
        except UnicodeEncodeError:
            raise _BadArgumentsError(self._explain("the text has half of a surrogate pair in it")) from None
        except msgspec.DecodeError as error:
            raise _BadArgumentsError(self._explain(f"no valid JSON object: {error}")) from None
        except RecursionError:
            raise _BadArgumentsError(self._explain("the JSON is nested too deeply")) from None
        values = {name: getattr(decoded, field) for field, name in self._names.items()}
        return {name: value for name, value in values.items() if value is not msgspec.UNSET}

    def _explain(self, fault: str) -> str:
        place = _MISSING_OR_UNKNOWN.search(fault) or _PLACE.search(fault)
        texts = [f"bad arguments: {fault.replace('`$.', '`')[:MAX_TEXT_CHARS]}"]
        properties = self.schema["properties"]
        if place and place[1] in properties:
            schema = msgspec.json.encode(properties[place[1]]).decode()
            if len(schema) <= MAX_TEXT_CHARS:
                texts.append(f"`{place[1]}` is to fit {schema}")
        required = self.schema["required"]
        fields = ", ".join(f"{name} (required)" if name in required else name for name in properties)
        texts.append(f"the fields are: {fields}" if fields else "there are no fields: write {}")
        return "; ".join(texts)


def _unset() -> msgspec.UnsetType:
    return msgspec.UNSET


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # hints are the user's code, evaluated here
        raise TypeError(
            f"{function.__qualname__} cannot be a tool: its type hints cannot be read ({error}); "
            "they must be names of its module that exist at run time"
        ) from error


def _hint_of(function: Callable[..., Any], parameter: inspect.Parameter, hints: dict[str, Any]) -> Any:
    """The parameter's hint, once it is known that the model can give such a parameter."""

    def refuse(why: str) -> TypeError:
        return TypeError(f"{function.__qualname__} cannot be a tool: its parameter {parameter.name!r} {why}")

    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise refuse("takes any number of arguments; name each")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise refuse("is positional-only; arguments come by name")
    if parameter.name not in hints:
        raise refuse("has no type hint")
    if not _PARAMETER_NAME.fullmatch(parameter.name):
        raise refuse("is not named in ASCII letters, digits and _, at most 64 (vendors refuse others)")
    hint = hints[parameter.name]
    if hint is not ToolContext and hint != ToolContext | None:
        try:
            msgspec.json.Decoder(hint)
            msgspec.json.schema(hint)
        except Exception as error:
            raise refuse(f"is hinted {hint!r}, which cannot be read from JSON: {error}") from error
    return hint


def _described(hint: Any, description: str | None) -> Any:
    """The hint with the docstring's description, unless it brings its own."""
    own = (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, msgspec.Meta))
    if not description or any(part.description for part in own):
        return hint
    return Annotated[hint, msgspec.Meta(description=description)]


def _schema(struct: type[msgspec.Struct], defaults: dict[str, Any]) -> dict[str, Any]:
    schema = digestible(msgspec.json.schema(struct))
    schema.pop("description", None)  # the struct's, which has none of its own
    for name, default in defaults.items():
        try:
            schema["properties"][name]["default"] = msgspec.json.decode(msgspec.json.encode(default))
        except (TypeError, ValueError, RecursionError):
            continue  # a default that is no JSON is the function's own business
    return schema


def _as_result(value: Any) -> ToolResult:
    """What the function returned as a result whose value is plain JSON, or text."""
    if isinstance(value, ToolResult):
        return value
    if value is None or isinstance(value, str):
        return ToolResult(value)
    try:
        plain = msgspec.to_builtins(value, enc_hook=str, str_keys=True)
        msgspec.json.encode(plain)
    except (TypeError, ValueError, RecursionError):
        return ToolResult(str(value))
    return ToolResult(plain)
