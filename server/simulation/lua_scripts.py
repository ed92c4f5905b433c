"""Redis's scripts, run by a real Lua 5.1, as Redis runs them: values go both ways as Redis converts them.

Scripts are the project's own (``shared_scripts``): nothing here keeps a hostile one from doing harm. They see Lua's
basic, ``string``, ``table`` and ``math`` libraries, ``redis.call`` and ``cjson.decode``; a global that is not there is
an error, as it is in Redis.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Any

from lupa import lua51  # type: ignore[import-untyped]

from .memory_streams import ReplyError

_SANDBOX = b"""
for _, name in ipairs{'os', 'io', 'require', 'module', 'package', 'debug', 'dofile', 'loadfile', 'python', 'print'} do
  _G[name] = nil
end
local function refuse(_, name)
  if name == 'debug' then return nil end  -- lupa looks for it, outside of any call that is protected
  error("Script attempted to access nonexistent global variable '" .. name .. "'", 2)
end
setmetatable(_G, {__index = refuse, __newindex = refuse})
"""


class LuaScripts:
    """Scripts by their digests; ``call`` does what they ask of Redis. Each has a Lua of its own."""

    def __init__(self, call: Callable[[bytes, list[bytes]], Any]) -> None:
        self._lua = lua51.LuaRuntime(encoding=None, register_eval=False, register_builtins=False)
        self._lua.execute(_SANDBOX)
        self._redis = self._table({b"call": self._called})
        self._cjson = self._table({b"decode": self._decoded})
        self._scripts: dict[bytes, Any] = {}
        self._call = call

    def load(self, text: bytes) -> bytes:
        """Keep a script; its digest.

        Raises:
            ReplyError: it is no Lua.
        """
        digest = sha1(text, usedforsecurity=False).hexdigest().encode()
        if digest not in self._scripts:
            try:
                self._scripts[digest] = self._lua.execute(
                    b"return function(redis, cjson, KEYS, ARGV) " + text + b"\nend"
                )
            except lua51.LuaError as error:
                raise ReplyError(f"Error compiling script: {error}") from error
        return digest

    def forget(self) -> None:
        """None is known any more."""
        self._scripts.clear()

    def run(self, digest: bytes, keys: Sequence[bytes], arguments: Sequence[bytes]) -> Any:
        """What the script answers.

        Raises:
            ReplyError: it is not known, fails, or asks for what cannot be done. What it did before that stays done.
        """
        script = self._scripts.get(digest)
        if script is None:
            raise ReplyError("No matching script. Please use EVAL.")
        try:
            result = script(self._redis, self._cjson, self._table(keys), self._table(arguments))
        except lua51.LuaError as error:
            raise ReplyError(str(error)) from error
        return _from_lua(result[0] if isinstance(result, tuple) else result)

    def _table(self, values: Any) -> Any:
        return self._lua.table_from(values)

    def _called(self, *words: Any) -> Any:
        if not words:
            raise ReplyError("Please specify at least one argument for this redis lib call")
        name, *arguments = [_argument(word) for word in words]
        return self._to_lua(self._call(name.upper(), arguments))

    def _decoded(self, text: bytes) -> Any:
        try:
            return self._json_to_lua(json.loads(text))
        except ValueError as error:
            raise ReplyError(f"Expected value but found invalid token: {error}") from error

    def _to_lua(self, answer: Any) -> Any:
        """RESP2, which scripts get: a hash is a list of names and values, nothing is ``false``."""
        match answer:
            case None:
                return False
            case bytes() if type(answer) is not bytes:
                return self._table({b"ok": bytes(answer)})
            case dict():
                return self._table([self._to_lua(part) for pair in answer.items() for part in pair])
            case set():
                return self._table(sorted(answer))  # in any order in Redis; here in the same one each time
            case list():
                return self._table([self._to_lua(part) for part in answer])
        return answer

    def _json_to_lua(self, value: Any) -> Any:
        match value:
            case None:
                raise ReplyError("null in JSON is not known here")
            case str():
                return value.encode()
            case list():
                return self._table([self._json_to_lua(item) for item in value])
            case dict():
                return self._table({name.encode(): self._json_to_lua(item) for name, item in value.items()})
        return value


def _argument(word: Any) -> bytes:
    match word:
        case bytes():
            return word
        case int() if not isinstance(word, bool):
            return b"%d" % word
        case float():
            return b"%.17g" % word
    raise ReplyError("Lua redis lib command arguments must be strings or integers")


def _from_lua(value: Any) -> Any:
    match value:
        case None | False:
            return None
        case True:
            return 1
        case bytes() | int():
            return value
        case float():
            return int(value)
    if lua51.lua_type(value) != "table":
        return None
    if isinstance(problem := value[b"err"], bytes):
        raise ReplyError(problem.decode().removeprefix("ERR "))
    if isinstance(done := value[b"ok"], bytes):
        return done
    found: list[Any] = []
    while (part := value[len(found) + 1]) is not None:
        found.append(_from_lua(part))
    return found
