"""A Redis in memory and in virtual time, for simulated worlds: what the shared log asks of one, and how one fails.

Connections to it are ``memory_link``'s. It is told what fails by its attributes and by ``forget_last``, ``lose_answer``
and ``break_connections``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import trio

from .lua_scripts import LuaScripts
from .memory_store import WRITES, MemoryStore, Status
from .memory_streams import ReplyError, integer

REMEMBERED_SECONDS = 10.0
"""How far back ``forget_last`` can go."""


class Breakable(Protocol):
    """A connection, as it is known here."""

    def invalidate(self, reason: str) -> None:
        """It is lost."""
        ...


class MemoryRedis:
    """One Redis. Its clock is trio's.

    Attributes:
        latency: how many seconds a command is on its way here, and its answer on the way back.
    """

    def __init__(self) -> None:
        self.latency = 0.0
        self._store = MemoryStore()
        self._store.on_added = self._added
        self._scripts = LuaScripts(self._do)
        self._old = MemoryStore()
        self._journal: deque[tuple[int, bytes, Sequence[bytes]]] = deque()  # what was done since ``_old``
        self._readers: dict[bytes, list[trio.Event]] = {}
        self._connections: dict[Breakable, None] = {}
        self._away_since: float | None = None
        self._going = trio.Event()
        self._going.set()
        self._commands_until_lost: int | None = None

    # Commands

    def do(self, command: Sequence[bytes]) -> Any:
        """Do one command, now; XREAD does not wait.

        Raises:
            ReplyError: Redis answers with an error.
        """
        name, *arguments = command
        name = name.upper()
        if name == b"EVALSHA" and len(arguments) > 1:
            keys = 2 + integer(arguments[1])
            return self._scripts.run(arguments[0], arguments[2:keys], arguments[keys:])
        if name == b"SCRIPT" and len(arguments) == 2 and arguments[0].upper() == b"LOAD":
            return self._scripts.load(arguments[1])
        answer = self._do(name, arguments)
        return bytes(answer) if isinstance(answer, Status) else answer

    def _do(self, name: bytes, arguments: Sequence[bytes]) -> Any:
        now = _milliseconds(trio.current_time())
        answer = self._store.do(name, arguments, now)
        if name in WRITES:
            self._journal.append((now, name, arguments))
            while self._journal[0][0] < now - 1000 * REMEMBERED_SECONDS:
                at, name, arguments = self._journal.popleft()
                self._old.do(name, arguments, at)
        return answer

    async def wait_added(self, keys: Sequence[bytes]) -> None:
        """Until one of these streams has an entry more."""
        added = trio.Event()
        for key in keys:
            self._readers.setdefault(key, []).append(added)
        try:
            await added.wait()
        finally:
            for key in keys:
                self._readers[key].remove(added)
                if not self._readers[key]:
                    del self._readers[key]

    def _added(self, key: bytes) -> None:
        for reader in self._readers.get(key, ()):
            reader.set()

    # Connections

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    def connect(self, connection: Breakable) -> bool:
        """There is this connection too; whether it is taken."""
        if self.away:
            return False
        self._connections[connection] = None
        return True

    def disconnect(self, connection: Breakable) -> None:
        """It is gone, if it was there."""
        self._connections.pop(connection, None)

    async def wait_going(self) -> None:
        """Until it does not stand still; without a checkpoint if it does not."""
        if self.stands_still:  # noqa: ASYNC910
            await self._going.wait()

    # Faults

    @property
    def away(self) -> bool:
        """Connections to it break, and new ones are refused."""
        return self._away_since is not None

    @away.setter
    def away(self, away: bool) -> None:
        if away and not self.away:
            self._away_since = trio.current_time()
            self.break_connections("Redis went away")
        elif not away:
            self._away_since = None

    @property
    def stands_still(self) -> bool:
        """It does nothing, and its connections stay: what is asked is done once it goes on."""
        return not self._going.is_set()

    @stands_still.setter
    def stands_still(self, still: bool) -> None:
        if still and not self.stands_still:
            self._going = trio.Event()
        elif not still:
            self._going.set()

    def break_connections(self, reason: str = "the connection was reset") -> None:
        """All that there are now; what is on its way is lost."""
        for connection in list(self._connections):
            connection.invalidate(reason)

    def forget_last(self, seconds: float) -> None:
        """It is started again without its last seconds: what was done before it went away, or before now.

        Raises:
            ValueError: that is more than is remembered.
        """
        if not 0 <= seconds <= REMEMBERED_SECONDS:
            raise ValueError(f"only the last {REMEMBERED_SECONDS:g} s can be forgotten")
        self.break_connections("Redis was started again")
        ended = trio.current_time() if self._away_since is None else self._away_since
        self._store = self._old.copy()
        while self._journal and self._journal[-1][0] > _milliseconds(ended - seconds):
            self._journal.pop()
        for at, name, arguments in self._journal:
            self._store.do(name, arguments, at)
        self._store.on_added = self._added
        self._scripts.forget()

    def lose_answer(self, after: int = 0) -> None:
        """Let the next command be done, or the one after so many more, and its connection break before the answer.

        What stands behind it on that connection is not done.
        """
        self._commands_until_lost = after

    def loses_answer(self) -> bool:
        """Whether the answer of the command that was just done is to be lost."""
        if self._commands_until_lost is None:
            return False
        self._commands_until_lost -= 1
        if self._commands_until_lost >= 0:
            return False
        self._commands_until_lost = None
        return True


def _milliseconds(time: float) -> int:
    return int(time * 1000)


__all__ = ["REMEMBERED_SECONDS", "Breakable", "MemoryRedis", "ReplyError"]
