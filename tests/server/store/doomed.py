"""A process that writes turns until it is killed; run by test_killed.

It forks a writer for each byte that it reads. The writer tells its pid, then says one letter at each point where death
may meet it: around each statement, before each commit, ``s`` when a turn was saved. If the byte was ``w``, it waits
there for another one.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import trio
from sqlalchemy import Engine, event

from engine.memory import TurnRecord
from engine.provider import Message
from server.store.database import Database
from server.store.rows import Scope
from server.store.turns import begin_turn, save_turn

SCOPE = Scope("tenant", "user", "agent")
NOW = "2026-11-22T12:00:00.000000+00:00"


def listen(reach: Callable[[bytes], None]) -> None:
    """Make every statement and commit a point to die at, those of the opening too."""

    @event.listens_for(Engine, "connect")
    def _trace(connection: sqlite3.Connection, _: Any) -> None:
        # Not SQLAlchemy's event: prepared statements go past it.
        connection.set_trace_callback(lambda _: reach(b"."))

    @event.listens_for(Engine, "after_cursor_execute")
    def _after_statement(*_: Any) -> None:
        reach(b",")

    @event.listens_for(Engine, "commit")
    def _before_commit(*_: Any) -> None:
        reach(b"c")


def write_turns(url: str, life: str, *, waits: bool) -> None:
    def reach(point: bytes) -> None:
        os.write(1, point)
        if waits:
            os.read(0, 1)

    listen(reach)
    database = Database.open(url, inline=True)

    async def main() -> None:
        for number in count():
            run_id = f"{life}-{number}"
            question = Message("user", f"question {run_id}")
            await database.write(begin_turn, SCOPE, "session", run_id, None, question, NOW)
            reach(b"b")
            answer = (Message("assistant", f"answer {run_id}"),)
            turn = TurnRecord(
                run_id=run_id,
                status="done",
                messages=answer,
                response="",
                usage=None,
                total_steps=1,
                elapsed_ms=1.0,
                ttfb_ms=None,
            )
            assert await database.write(save_turn, turn, NOW)
            reach(b"s")

    trio.run(main)


def main(url: str) -> None:
    for life in count():
        manner = os.read(0, 1)
        if not manner:
            return
        writer = os.fork()
        if writer == 0:
            os.write(1, f"{os.getpid()}\n".encode())
            write_turns(url, f"life{life}", waits=manner == b"w")
        _, status = os.waitpid(writer, 0)
        os.write(1, b"dead\n" if os.WIFSIGNALED(status) else b"gone\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
