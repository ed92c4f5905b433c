"""What a Redis holds and does, in memory and without any clock of its own: the commands that the shared log uses.

Answers have the shapes in which coredis gives them undecoded (RESP3): dicts of hashes, sets, lists of stream entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .memory_streams import ReplyError, Stream, check_interval, integer, new_id, parse_count, parse_xread, take_length

__all__ = ["WRITES", "MemoryStore", "ReplyError", "Status"]

WRITES = frozenset(b"DEL HDEL HINCRBY HSET PEXPIRE SADD SET SREM XADD XTRIM".split())

_WRONG_TYPE = "Operation against a key holding the wrong kind of value"


class Status(bytes):
    """``OK`` and its like, which are no strings to a script."""


class MemoryStore:
    """Keys and values. ``now`` is in milliseconds.

    Attributes:
        on_added: called with the key of a stream that has an entry more.
    """

    def __init__(self) -> None:
        self._values: dict[bytes, Any] = {}
        self._expires_at: dict[bytes, int] = {}
        self._now = 0
        self.on_added: Callable[[bytes], None] = lambda _key: None

    def do(self, name: bytes, arguments: Sequence[bytes], now: int) -> Any:
        """Do one command.

        Raises:
            ReplyError: it is none of those known here, or cannot be done.
        """
        self._now = now
        if name not in _COMMANDS:
            raise ReplyError(f"unknown command {name.decode()!r}, with args beginning with: ")
        least, command = _COMMANDS[name]
        if len(arguments) < least:
            raise _wrong_number(name)
        return command(self, *arguments)

    def copy(self) -> MemoryStore:
        """The same keys and values; what is done to one does not change the other."""
        store = MemoryStore()
        store._values = {
            key: value if isinstance(value, bytes) else value.copy() for key, value in self._values.items()
        }
        store._expires_at = dict(self._expires_at)
        return store

    # Keys

    def _find(self, key: bytes, kind: type[Any] = object) -> Any:
        expires_at = self._expires_at.get(key)
        if expires_at is not None and self._now > expires_at:
            self._drop(key)
        value = self._values.get(key)
        if value is not None and not isinstance(value, kind):
            raise ReplyError(_WRONG_TYPE)
        return value

    def _find_or_make(self, key: bytes, kind: type[Any]) -> Any:
        value = self._find(key, kind)
        if value is None:
            value = self._values[key] = kind()
        return value

    def _drop(self, key: bytes) -> None:
        del self._values[key]
        self._expires_at.pop(key, None)

    def _delete(self, *keys: bytes) -> int:
        found = [key for key in dict.fromkeys(keys) if self._find(key) is not None]
        for key in found:
            self._drop(key)
        return len(found)

    def _exists(self, *keys: bytes) -> int:
        return sum(self._find(key) is not None for key in keys)

    def _keys(self, pattern: bytes) -> list[bytes]:
        if pattern != b"*":
            raise ReplyError("only KEYS * is known here")
        return [key for key in list(self._values) if self._find(key) is not None]

    def _pexpire(self, key: bytes, milliseconds: bytes) -> int:
        live = integer(milliseconds)
        if self._find(key) is None:
            return 0
        self._expires_at[key] = self._now + live
        if live <= 0:
            self._drop(key)
        return 1

    def _pttl(self, key: bytes) -> int:
        if self._find(key) is None:
            return -2
        expires_at = self._expires_at.get(key)
        return -1 if expires_at is None else expires_at - self._now

    # Strings

    def _get(self, key: bytes) -> Any:
        return self._find(key, bytes)

    def _set(self, key: bytes, value: bytes, *options: bytes) -> bytes:
        live = 0
        if options:
            if len(options) != 2 or options[0].upper() != b"PX":
                raise ReplyError("syntax error")
            live = integer(options[1])
            if live <= 0:
                raise ReplyError("invalid expire time in 'set' command")
        self._values[key] = value
        self._expires_at.pop(key, None)
        if live:
            self._expires_at[key] = self._now + live
        return Status(b"OK")

    # Hashes

    def _hget(self, key: bytes, field: bytes) -> Any:
        return (self._find(key, dict) or {}).get(field)

    def _hexists(self, key: bytes, field: bytes) -> int:
        return int(self._hget(key, field) is not None)

    def _hmget(self, key: bytes, *fields: bytes) -> list[bytes | None]:
        found = self._find(key, dict) or {}
        return [found.get(field) for field in fields]

    def _hgetall(self, key: bytes) -> dict[bytes, bytes]:
        return dict(self._find(key, dict) or {})

    def _hset(self, key: bytes, *pairs: bytes) -> int:
        if len(pairs) % 2:
            raise _wrong_number(b"HSET")
        fields = self._find_or_make(key, dict)
        before = len(fields)
        fields.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(fields) - before

    def _hincrby(self, key: bytes, field: bytes, amount: bytes) -> int:
        more = integer(amount)
        before = self._hget(key, field)
        number = more + (0 if before is None else integer(before, "hash value is not an integer"))
        self._find_or_make(key, dict)[field] = b"%d" % number
        return number

    def _hdel(self, key: bytes, *fields: bytes) -> int:
        found = self._find(key, dict) or {}
        gone = [field for field in fields if found.pop(field, None) is not None]
        if gone and not found:
            self._drop(key)
        return len(gone)

    # Sets

    def _sadd(self, key: bytes, *members: bytes) -> int:
        found = self._find_or_make(key, set)
        before = len(found)
        found.update(members)
        return len(found) - before

    def _srem(self, key: bytes, *members: bytes) -> int:
        found = self._find(key, set) or set()
        gone = found.intersection(members)
        found -= gone
        if gone and not found:
            self._drop(key)
        return len(gone)

    def _scard(self, key: bytes) -> int:
        return len(self._find(key, set) or ())

    def _smembers(self, key: bytes) -> set[bytes]:
        return set(self._find(key, set) or ())

    # Streams

    def _xadd(self, key: bytes, *words: bytes) -> bytes | None:
        rest = list(words)
        only_there = rest[0].upper() == b"NOMKSTREAM"
        del rest[:only_there]
        length = take_length(rest)
        if len(rest) < 3 or len(rest) % 2 == 0:
            raise _wrong_number(b"XADD")
        if rest[0] != b"*":
            new_id(rest[0])  # is read before the stream is looked for
        stream = self._find(key, Stream)
        if stream is None and only_there:
            return None
        if stream is None:
            stream = Stream()
        entry_id: bytes = stream.add(rest[0], rest[1:], self._now)
        self._values[key] = stream
        if length is not None:
            stream.trim(length)
        self.on_added(key)
        return entry_id

    def _xtrim(self, key: bytes, *words: bytes) -> int:
        rest = list(words)
        length = take_length(rest)
        if length is None or rest:
            raise ReplyError("syntax error")
        stream = self._find(key, Stream)
        return 0 if stream is None else stream.trim(length)

    def _xrange(self, key: bytes, start: bytes, end: bytes, *count: bytes) -> list[Any]:
        check_interval(start, end)
        most = parse_count(count)
        stream = self._find(key, Stream)
        return [] if stream is None else stream.between(start, end)[:most]

    def _xrevrange(self, key: bytes, end: bytes, start: bytes, *count: bytes) -> list[Any]:
        check_interval(start, end)
        most = parse_count(count)
        stream = self._find(key, Stream)
        return [] if stream is None else stream.between(start, end)[::-1][:most]

    def _xread(self, *words: bytes) -> dict[bytes, list[Any]] | None:
        reading = parse_xread(words)
        found = {}
        for key, after in zip(reading.keys, reading.after, strict=True):
            stream = self._find(key, Stream)
            if stream is not None and (entries := stream.after(after, reading.count)):
                found[key] = entries
        return found or None


def _wrong_number(name: bytes) -> ReplyError:
    return ReplyError(f"wrong number of arguments for '{name.decode().lower()}' command")


_COMMANDS: dict[bytes, tuple[int, Callable[..., Any]]] = {
    b"DEL": (1, MemoryStore._delete),
    b"EXISTS": (1, MemoryStore._exists),
    b"GET": (1, MemoryStore._get),
    b"HDEL": (2, MemoryStore._hdel),
    b"HEXISTS": (2, MemoryStore._hexists),
    b"HGET": (2, MemoryStore._hget),
    b"HGETALL": (1, MemoryStore._hgetall),
    b"HINCRBY": (3, MemoryStore._hincrby),
    b"HMGET": (2, MemoryStore._hmget),
    b"HSET": (3, MemoryStore._hset),
    b"KEYS": (1, MemoryStore._keys),
    b"PEXPIRE": (2, MemoryStore._pexpire),
    b"PTTL": (1, MemoryStore._pttl),
    b"SADD": (2, MemoryStore._sadd),
    b"SCARD": (1, MemoryStore._scard),
    b"SET": (2, MemoryStore._set),
    b"SMEMBERS": (1, MemoryStore._smembers),
    b"SREM": (2, MemoryStore._srem),
    b"XADD": (4, MemoryStore._xadd),
    b"XRANGE": (3, MemoryStore._xrange),
    b"XREAD": (3, MemoryStore._xread),
    b"XREVRANGE": (3, MemoryStore._xrevrange),
    b"XTRIM": (3, MemoryStore._xtrim),
}
"""What each needs at least, and does. Of KEYS only ``*``; PTTL and KEYS are for tests."""
