"""What was said: sessions and their messages. A user's own; an admin may name another user."""

from __future__ import annotations

from sqlalchemy import Connection

from .agent_access import find_scope
from .api_memory import UserQuery
from .errors import not_found
from .paging import Page, PageQuery
from .requests import UserId
from .routing import API, Call, Route
from .store import history
from .store.rows import Scope, StoredMessage, StoredSession


class HistoryQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which messages.

    Attributes:
        session_id: of one session; left out, of all.
        limit: at most so many items.
        offset: how many of the newest to leave out.
        user_id: of which user of the tenant, for an admin; left out, of yourself.
    """

    session_id: str | None = None
    user_id: UserId | None = None


class SessionsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which sessions.

    Attributes:
        limit: at most so many items.
        offset: how many items to leave out before them.
        user_id: of which user of the tenant, for an admin; left out, of yourself.
    """

    user_id: UserId | None = None


async def get_history(call: Call[None, HistoryQuery]) -> Page[StoredMessage]:
    """What was said, the newest last."""
    query = call.query
    items, total = await call.services.read(_messages, await find_scope(call, query.user_id), query)
    return query.page(items, total)


def _messages(connection: Connection, scope: Scope, query: HistoryQuery) -> tuple[list[StoredMessage], int]:
    found = history.list_messages(connection, scope, query.session_id, query.limit, query.offset)
    return found, history.count_messages(connection, scope, query.session_id)


async def list_sessions(call: Call[None, SessionsQuery]) -> Page[StoredSession]:
    """The sessions, the one used last first."""
    query = call.query
    items, total = await call.services.read(_sessions, await find_scope(call, query.user_id), query)
    return query.page(items, total)


def _sessions(connection: Connection, scope: Scope, query: SessionsQuery) -> tuple[list[StoredSession], int]:
    found = history.list_sessions(connection, scope, query.limit, query.offset)
    return found, history.count_sessions(connection, scope)


async def delete_session(call: Call[None, UserQuery]) -> None:
    """Delete a session with what was said in it."""
    scope = await find_scope(call, call.query.user_id)
    if not await call.services.write(history.delete_session, scope, call.ids["session_id"]):
        raise not_found("session", call.ids["session_id"])


_AGENT = f"{API}/agents/{{agent_id}}"

ROUTES = (
    Route(
        method="GET",
        path=f"{_AGENT}/chat/history",
        handler=get_history,
        summary="What was said between you and the agent, the newest last",
        tag="History",
        query=HistoryQuery,
        answer=Page[StoredMessage],
    ),
    Route(
        method="GET",
        path=f"{_AGENT}/sessions",
        handler=list_sessions,
        summary="Your sessions with the agent, the one used last first",
        tag="History",
        query=SessionsQuery,
        answer=Page[StoredSession],
    ),
    Route(
        method="DELETE",
        path=f"{_AGENT}/sessions/{{session_id}}",
        handler=delete_session,
        summary="Delete a session: its messages, and the memories of what was said in it",
        tag="History",
        query=UserQuery,
        status=204,
    ),
)
