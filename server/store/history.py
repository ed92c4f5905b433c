"""What was said in a session: as the model is shown it, whole turns, and as people are shown it, page by page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import msgspec
from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    RowMapping,
    Select,
    Text,
    and_,
    delete,
    func,
    select,
    type_coerce,
)

from engine.provider import Message, ToolCall

from .prepared import InsertInto, Prepared, Row, constant, given
from .rows import Scope, StoredMessage, StoredSession
from .run_events import drop_events
from .run_texts import drop_responses
from .schema import memories, messages, owned, owner_values, page_size, runs, sessions, storable_values

SPOKEN_ROLES = ("user", "assistant")


def _select_last_turns(_: InsertInto) -> Select[Any]:
    of_session = [messages.c[name] == given(name) for name in ("tenant_id", "user_id", "agent_id", "session_id")]
    turns = (
        select(messages.c.run_id, messages.c.number.label("began"))
        .join(runs, runs.c.run_id == messages.c.run_id)
        .where(*of_session, messages.c.role == constant("user"), runs.c.status != constant("running"))
        .order_by(messages.c.number.desc())
        .limit(given("limit"))
        .offset(constant(0))
        .subquery("turns")
    )
    plain = (messages.c[name] for name in ("run_id", "role", "content", "tool_call_id", "tool_failed"))
    as_json = (type_coerce(messages.c[name], Text) for name in ("images", "tool_calls"))
    whole = select(*plain, *as_json).join(turns, turns.c.run_id == messages.c.run_id)
    return whole.order_by(turns.c.began.desc(), messages.c.number)


_LAST_TURNS = Prepared(_select_last_turns)


def history(c: Connection, scope: Scope, session_id: str, messages_wanted: int) -> list[Message]:
    """The last messages of the session's ended turns, at most so many, whole turns, oldest first.

    A turn that does not fit whole is reduced to the user's message and the assistant's texts if that fits, and is the
    last to be taken. So reduced is any turn with a tool call that has no result: no model takes such a one.
    """
    if messages_wanted < 1:
        return []
    place = storable_values({**owner_values(scope), "session_id": session_id})
    rows = _LAST_TURNS.rows(c, {**place, "limit": page_size(messages_wanted)})
    return _fitting(([_message(row) for row in turn] for _, turn in groupby(rows, _run_of)), messages_wanted)


def list_messages(
    c: Connection,
    scope: Scope,
    session_id: str | None,
    limit: int,
    offset: int,
    roles: Sequence[str] = SPOKEN_ROLES,
) -> list[StoredMessage]:
    """A page of what was said, in one session or in all: the newest come last; ``offset`` skips the newest."""
    page = (
        select(messages, runs.c.status)
        .join(runs, runs.c.run_id == messages.c.run_id)
        .where(_said(scope, session_id, roles))
        .order_by(messages.c.number.desc())
        .limit(page_size(limit))
        .offset(page_size(offset))
    )
    return [_stored_message(row) for row in reversed(c.execute(page).mappings().all())]


def count_messages(c: Connection, scope: Scope, session_id: str | None, roles: Sequence[str] = SPOKEN_ROLES) -> int:
    """How many ``list_messages`` has."""
    query = select(func.count()).select_from(messages).where(_said(scope, session_id, roles))
    return c.execute(query).scalar_one()


def list_sessions(c: Connection, scope: Scope, limit: int, offset: int) -> list[StoredSession]:
    """The sessions of the scope, the one used last first, with how much was said in each."""
    said = and_(
        owned(messages, scope), messages.c.session_id == sessions.c.session_id, messages.c.role.in_(SPOKEN_ROLES)
    )
    count = select(func.count()).select_from(messages).where(said)
    query = select(
        sessions.c.session_id,
        sessions.c.created_at,
        sessions.c.updated_at,
        count.correlate(sessions).scalar_subquery().label("message_count"),
    ).where(owned(sessions, scope))
    page = query.order_by(sessions.c.updated_at.desc(), sessions.c.session_id).limit(page_size(limit))
    return [StoredSession(**row) for row in c.execute(page.offset(page_size(offset))).mappings()]


def count_sessions(c: Connection, scope: Scope) -> int:
    """How many ``list_sessions`` has."""
    return c.execute(select(func.count()).select_from(sessions).where(owned(sessions, scope))).scalar_one()


def delete_session(c: Connection, scope: Scope, session_id: str) -> bool:
    """Delete a session, its messages, its runs' events and answers, and the memories of what was said in it.

    False if there is none.

    Facts stay, and so do the rows of its runs.
    """
    of_session = and_(owned(sessions, scope), sessions.c.session_id == session_id)
    if c.execute(select(sessions.c.session_id).where(of_session).with_for_update()).one_or_none() is None:
        return False
    said_in_it = and_(owned(memories, scope), memories.c.session_id == session_id, memories.c.kind == "said")
    c.execute(delete(memories).where(said_in_it))
    its_runs = runs.c.run_id.in_(_runs_of(scope, session_id))
    drop_responses(c, its_runs)
    drop_events(c, its_runs)
    c.execute(delete(sessions).where(of_session))
    return True


def _runs_of(scope: Scope, session_id: str) -> CompoundSelect[Any]:
    """Ids of the session's runs: those that have messages, and those of an agent without memory."""
    with_words = select(messages.c.run_id).where(owned(messages, scope), messages.c.session_id == session_id)
    without = select(runs.c.run_id).where(
        owned(runs, scope), runs.c.session_id == session_id, runs.c.unremembered.is_not(None)
    )
    return with_words.union_all(without)


def _fitting(turns: Iterable[list[Message]], room: int) -> list[Message]:
    """As much of the turns, newest first, as there is room for; oldest first."""
    taken: list[list[Message]] = []
    for turn in turns:
        whole = _is_answered(turn)
        fitting = turn if whole and len(turn) <= room else _reduced(turn)
        if len(fitting) > room:
            break
        taken.append(fitting)
        room -= len(fitting)
        if room == 0 or (whole and fitting is not turn):
            break
    return [message for turn in reversed(taken) for message in turn]


def _is_answered(turn: list[Message]) -> bool:
    """Whether every tool call has its result, right after the assistant's turn, and every result its call."""
    waiting: set[str | None] = set()
    for message in turn:
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                return False
            waiting.discard(message.tool_call_id)
        elif waiting:
            return False
        else:
            waiting = {call.call_id for call in message.tool_calls}
    return not waiting


def _reduced(turn: list[Message]) -> list[Message]:
    return [
        msgspec.structs.replace(message, tool_calls=())
        for message in turn
        if message.role == "user" or (message.role == "assistant" and message.content)
    ]


def _said(scope: Scope, session_id: str | None, roles: Sequence[str]) -> ColumnElement[bool]:
    said = and_(owned(messages, scope), messages.c.role.in_(roles))
    return said if session_id is None else and_(said, messages.c.session_id == session_id)


def _run_of(row: Row) -> str:
    run_id: str = row[0]
    return run_id


def _message(row: Row) -> Message:
    _, role, content, tool_call_id, tool_failed, images, tool_calls = row
    return Message(
        role=role,
        content=content,
        images=() if images == "[]" else tuple(json.loads(images)),
        tool_calls=() if tool_calls == "[]" else tuple(ToolCall(**call) for call in json.loads(tool_calls)),
        tool_call_id=tool_call_id,
        tool_failed=bool(tool_failed),
    )


def _stored_message(row: RowMapping) -> StoredMessage:
    same = {name: row[name] for name in StoredMessage.__struct_fields__ if name not in ("id", "tool_calls")}
    return StoredMessage(id=row["number"], tool_calls=tuple(row["tool_calls"]), **same)
