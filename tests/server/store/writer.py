"""A process that opens a database when told to and writes turns: ``URL NAME TURNS``. Run by test_processes."""

from __future__ import annotations

import sys

import trio

from engine.memory import TurnRecord
from engine.provider import Message
from server.store.database import Database
from server.store.rows import Scope
from server.store.turns import begin_turn, save_turn

SCOPE = Scope("tenant", "user", "agent")
NOW = "2026-11-22T12:00:00.000000+00:00"


async def write_turns(database: Database, name: str, turns: int) -> None:
    for number in range(turns):
        run_id = f"{name}-{number}"
        question = Message("user", f"question {run_id}")
        await database.write(begin_turn, SCOPE, "session", run_id, None, question, NOW)
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


def main(url: str, name: str, turns: str) -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    database = Database.open(url)
    trio.run(write_turns, database, name, int(turns))
    database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
