"""Turns in the store: a run's row, the user's message that began it, and what it left behind when it ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Connection, and_, cast, func, select, update

from engine.memory import TurnRecord
from engine.provider import Message

from .memories import remember_said
from .prepared import Prepared, constant, given
from .rows import Scope, StoredRun
from .run_events import RESERVED_SEQ
from .run_texts import kept_response
from .schema import json_text, messages, owner_values, runs, sessions, storable, storable_or_none, storable_values

_PLACE = ("tenant_id", "user_id", "agent_id", "session_id")
_BEGUN = ("run_id", *_PLACE, "key_id", "status", "created_at", "reserved_seq", "unremembered")
_SAID = tuple(column.name for column in messages.c if column.name != "number")
_ENDED = (
    "status",
    "ended_at",
    "error_code",
    "reason",
    "total_steps",
    "elapsed_ms",
    "ttfb_ms",
    "input_tokens",
    "output_tokens",
    "usage_estimated",
)

_ADD_RUN = Prepared(lambda insert: insert(runs).values({name: given(name) for name in _BEGUN}).on_conflict_do_nothing())
_TOUCH_SESSION = Prepared(
    lambda insert: (
        insert(sessions)
        .values(
            {name: given(name) for name in _PLACE}
            | {"created_at": given("updated_at"), "updated_at": given("updated_at")}
        )
        .on_conflict_do_update(index_elements=_PLACE, set_={"updated_at": given("updated_at")})
    )
)
_ADD_MESSAGE = Prepared(lambda insert: insert(messages).values({name: given(messages.c[name]) for name in _SAID}))
_END_RUN = Prepared(
    lambda _: (
        update(runs)
        .where(runs.c.run_id == given("run_id"), runs.c.status == constant("running"))
        .values({name: given(name) for name in _ENDED} | {"response": kept_response(given(runs.c.response))})
    )
)
_NOTE_USE = Prepared(
    lambda _: (
        update(sessions)
        .where(*(sessions.c[name] == given(name) for name in _PLACE))
        .values(updated_at=given("updated_at"))
    )
)
# PostgreSQL locks the session first and the run after it, as those do that delete the session. SQLite has one writer.
_FIND_SAID = Prepared(
    lambda _: (
        select(*(sessions.c[name] for name in _PLACE), messages.c.content)
        .join(messages, and_(*(messages.c[name] == sessions.c[name] for name in _PLACE)))
        .where(messages.c.run_id == given("run_id"), messages.c.role == constant("user"))
        .with_for_update(key_share=True, of=sessions)
    )
)


def begin_turn(
    c: Connection, scope: Scope, session_id: str, run_id: str, key_id: str | None, message: Message, now: str
) -> bool:
    """Keep the user's message and that its run is under way, once for each run id; whether it began the session.

    On PostgreSQL it waits for who deletes the session just then.
    """
    begun = _begun(scope, session_id, run_id, key_id, now) | _said(message)
    if not _ADD_RUN.run(c, begun):
        return False
    is_first = _NOTE_USE.run(c, begun) == 0
    if is_first:  # or another begins it at the same time: then there is one, and nothing in it that has ended
        _TOUCH_SESSION.run(c, begun)
    _ADD_MESSAGE.run(c, begun)
    return is_first


def begin_run(c: Connection, scope: Scope, session_id: str, run_id: str, key_id: str | None, now: str) -> bool:
    """Keep that a run is under way, and nothing of what is said in it; False if that is known."""
    return _ADD_RUN.run(c, _begun(scope, session_id, run_id, key_id, now) | {"unremembered": True}) == 1


def _begun(scope: Scope, session_id: str, run_id: str, key_id: str | None, now: str) -> dict[str, Any]:
    return {
        **storable_values({**owner_values(scope), "session_id": session_id, "run_id": run_id, "key_id": key_id}),
        "status": "running",
        "created_at": now,
        "updated_at": now,
        "reserved_seq": RESERVED_SEQ,
        "unremembered": None,
    }


def save_turn(c: Connection, turn: TurnRecord, now: str) -> bool:
    """Keep what the run left behind and how it ended; False, and nothing is changed, if it had ended or is unknown.

    What the user said becomes a memory now. If the session was deleted meanwhile, only the run's row is kept, without
    its answer.
    """
    run_id = storable(turn.run_id)
    found = _FIND_SAID.rows(c, {"run_id": run_id})
    ended = {
        "run_id": run_id,
        "status": turn.status,
        "ended_at": now,
        "error_code": turn.error_code,
        "reason": storable_or_none(turn.reason),
        "response": storable(turn.response),
        "total_steps": turn.total_steps,
        "elapsed_ms": turn.elapsed_ms,
        "ttfb_ms": turn.ttfb_ms,
        "input_tokens": turn.usage.input_tokens if turn.usage else None,
        "output_tokens": turn.usage.output_tokens if turn.usage else None,
        "usage_estimated": turn.usage.estimated if turn.usage else None,
    }
    if _END_RUN.run(c, ended) == 0:
        return False
    for tenant_id, user_id, agent_id, session_id, content in found:
        scope = Scope(tenant_id, user_id, agent_id)
        remember_said(c, run_id, scope, content)
        place = {**owner_values(scope), "session_id": session_id, "run_id": run_id, "created_at": now}
        _ADD_MESSAGE.run_each(c, [{**place, **row} for row in _rows(turn)])
        _NOTE_USE.run(c, {**place, "updated_at": now})
    return True


def keep_said(c: Connection, run_id: str) -> None:
    """Have what the user said in this run as a memory: for one that is ended without ``save_turn``."""
    for tenant_id, user_id, agent_id, _, content in _FIND_SAID.rows(c, {"run_id": run_id}):
        remember_said(c, run_id, Scope(tenant_id, user_id, agent_id), content)


def find_run(c: Connection, run_id: str) -> StoredRun | None:
    """The run of that id, whosever it is."""
    row = c.execute(select(runs).where(runs.c.run_id == run_id)).mappings().one_or_none()
    if row is None:
        return None
    return StoredRun(**{name: row[name] for name in StoredRun.__struct_fields__})


def tokens_used_since(c: Connection, key_id: str, since: str) -> int:
    """Input and output tokens of the key's runs that have ended since then."""
    used = func.coalesce(runs.c.input_tokens, 0) + func.coalesce(runs.c.output_tokens, 0)
    query = select(cast(func.coalesce(func.sum(used), 0), BigInteger)).where(runs.c.key_id == key_id)
    return int(c.execute(query.where(runs.c.ended_at >= since)).scalar_one())


def _rows(turn: TurnRecord) -> Iterator[dict[str, Any]]:
    kept = [
        message for message in turn.messages if message.role != "assistant" or message.content or message.tool_calls
    ]
    said = any(message.role == "assistant" and message.content for message in kept)
    if turn.response and not said:
        kept.append(Message("assistant", turn.response))
    last = len(kept) - 1
    for at, message in enumerate(kept):
        broke_off = at == last and message.role == "assistant" and turn.status != "done"
        yield _said(message, partial=broke_off)


def _said(message: Message, *, partial: bool = False) -> dict[str, Any]:
    calls = message.tool_calls
    return {
        "role": message.role,
        "content": storable(message.content),
        "images": json_text(list(message.images)) if message.images else "[]",
        "tool_calls": json_text([msgspec.structs.asdict(call) for call in calls]) if calls else "[]",
        "tool_call_id": storable_or_none(message.tool_call_id),
        "tool_failed": message.tool_failed,
        "partial": partial,
    }
