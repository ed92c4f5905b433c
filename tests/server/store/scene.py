"""What the store's tests are about: scopes, times, turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.events import Usage
from engine.memory import TurnRecord
from engine.provider import Message, ToolCall
from providers.registry import ModelConfig
from server.records import AgentRecord
from server.store.database import Database
from server.store.rows import Scope
from server.store.turns import begin_turn, save_turn

SCOPE = Scope("tenant", "user", "agent")
FOREIGN_SCOPES = (Scope("other", "user", "agent"), Scope("tenant", "other", "agent"), Scope("tenant", "user", "other"))


def at(second: int) -> str:
    """A time of the store's form, that many seconds into a minute."""
    return f"2026-11-22T12:00:{second:02}.000000+00:00"


def record(agent_id: str = "agent", **fields: Any) -> AgentRecord:
    """An agent of that id."""
    return AgentRecord(id=agent_id, llm_config=ModelConfig(provider="replay", model="gpt4o-short"), **fields)


def said(text: str) -> Message:
    """A message of the user's."""
    return Message("user", text)


def answer(text: str) -> Message:
    """A message of the assistant's."""
    return Message("assistant", text)


def called(*call_ids: str, text: str = "") -> Message:
    """An assistant's turn that calls a tool, once for each id."""
    calls = tuple(ToolCall(call_id, "calculator", '{"expression":"1+1"}') for call_id in call_ids)
    return Message("assistant", text, tool_calls=calls)


def gave(call_id: str, text: str = "2") -> Message:
    """A tool's result."""
    return Message("tool", text, tool_call_id=call_id)


def turn(run_id: str, *messages: Message, **fields: Any) -> TurnRecord:
    """What a run left behind: by default one that came to its end."""
    whole = TurnRecord(
        run_id=run_id,
        status="done",
        messages=messages,
        response="".join(message.content for message in messages if message.role == "assistant"),
        usage=Usage(input_tokens=10, output_tokens=5),
        total_steps=1,
        elapsed_ms=120.5,
        ttfb_ms=20.25,
    )
    return msgspec.structs.replace(whole, **fields)


async def have_turn(
    database: Database,
    run_id: str,
    question: str,
    messages: Sequence[Message] = (answer("ok"),),
    *,
    scope: Scope = SCOPE,
    session_id: str = "session",
    key_id: str | None = None,
    second: int = 0,
    **fields: Any,
) -> None:
    """A whole turn, in the store."""
    await database.write(begin_turn, scope, session_id, run_id, key_id, said(question), at(second))
    assert await database.write(save_turn, turn(run_id, *messages, **fields), at(second + 1))
