"""Agents in the store: records of a tenant, for all its users or for one."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, func, or_, select, update

from server.records import AgentRecord

from .errors import AlreadyThereError
from .rows import StoredAgent
from .run_events import drop_events
from .run_texts import drop_responses
from .schema import add_row, agents, memories, messages, page_size, runs, sessions, working_memories


def create_agent(c: Connection, tenant_id: str, user_id: str | None, record: AgentRecord, now: str) -> StoredAgent:
    """Keep a new agent; ``user_id`` None is one for all users of the tenant.

    Raises:
        AlreadyThereError: the tenant has an agent of that id.
    """
    row = {
        "tenant_id": tenant_id,
        "id": record.id,
        "user_id": user_id,
        "record": msgspec.to_builtins(record),
        "revision": 1,
        "created_at": now,
        "updated_at": now,
    }
    added = add_row(c, agents, row)
    if added is None:
        raise AlreadyThereError(f"there is an agent {record.id!r} already")
    return _stored(added)


def find_agent(c: Connection, tenant_id: str, agent_id: str) -> StoredAgent | None:
    """The tenant's agent of that id, whichever user's it is."""
    row = c.execute(select(agents).where(_is(tenant_id, agent_id))).mappings().one_or_none()
    return None if row is None else _stored(row)


def list_agents(c: Connection, tenant_id: str, user_id: str | None, limit: int, offset: int) -> list[StoredAgent]:
    """The tenant's agents, oldest first: those of the user and those for all; with ``user_id`` None every one."""
    query = select(agents).where(_visible(tenant_id, user_id)).order_by(agents.c.created_at, agents.c.id)
    rows = c.execute(query.limit(page_size(limit)).offset(page_size(offset))).mappings()
    return [_stored(row) for row in rows]


def count_agents(c: Connection, tenant_id: str, user_id: str | None) -> int:
    """How many ``list_agents`` has."""
    return c.execute(select(func.count()).select_from(agents).where(_visible(tenant_id, user_id))).scalar_one()


def replace_agent(c: Connection, tenant_id: str, record: AgentRecord, now: str) -> StoredAgent | None:
    """Put another record in place of the one of that id, one revision on; None if there is none."""
    change = (
        update(agents)
        .where(_is(tenant_id, record.id))
        .values(record=msgspec.to_builtins(record), revision=agents.c.revision + 1, updated_at=now)
        .returning(agents)
    )
    row = c.execute(change).mappings().one_or_none()
    return None if row is None else _stored(row)


def delete_agent(c: Connection, tenant_id: str, agent_id: str) -> bool:
    """Delete the agent with all its users' sessions, messages, events, answers and memories; its runs keep a row."""
    if c.execute(delete(agents).where(_is(tenant_id, agent_id))).rowcount == 0:
        return False
    for table in (messages, sessions, memories, working_memories):
        c.execute(delete(table).where(table.c.tenant_id == tenant_id, table.c.agent_id == agent_id))
    drop_responses(c, and_(runs.c.tenant_id == tenant_id, runs.c.agent_id == agent_id))
    drop_events(c, and_(runs.c.tenant_id == tenant_id, runs.c.agent_id == agent_id))
    return True


def _is(tenant_id: str, agent_id: str) -> ColumnElement[bool]:
    return and_(agents.c.tenant_id == tenant_id, agents.c.id == agent_id)


def _visible(tenant_id: str, user_id: str | None) -> ColumnElement[bool]:
    of_tenant = agents.c.tenant_id == tenant_id
    if user_id is None:
        return of_tenant
    return and_(of_tenant, or_(agents.c.user_id == user_id, agents.c.user_id.is_(None)))


def _stored(row: RowMapping) -> StoredAgent:
    fields: dict[str, Any] = {name: row[name] for name in row if name not in ("id", "record")}
    return StoredAgent(record=msgspec.convert(row["record"], AgentRecord), **fields)
