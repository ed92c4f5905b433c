"""What agents remember of a user: memories, and the working memory. A user's own; an admin may name another user."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import Connection

from engine.memory import MemoryKind, MemoryRefusedError, WorkingMemoryChange
from engine.supervisor import random_run_id

from .agent_access import find_listed, find_scope, record_of
from .errors import ApiError, not_found
from .memory import MAX_FACT_CHARS
from .paging import Page, PageQuery
from .records import WorkingMemorySettings
from .requests import JSON_MEDIA_TYPE, UserId
from .routing import API, Call, Reply, Route
from .store import memories, working_memories
from .store.rows import Scope, StoredMemory
from .working_memory import patch_document, read_document, replace_document

MERGE_PATCH_MEDIA_TYPE = "application/merge-patch+json"
MAX_QUERY_CHARS = 10_000

MemoryText = Annotated[str, Meta(min_length=1, max_length=MAX_FACT_CHARS)]


class UserQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of whom.

    Attributes:
        user_id: of which user of the tenant, for an admin; left out, of yourself.
    """

    user_id: UserId | None = None


class MemoriesQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which memories.

    Attributes:
        kind: ``said`` are the user's messages, ``fact`` what was put down on purpose; left out, both.
        limit: at most so many items.
        offset: how many items to leave out before them.
        user_id: of which user of the tenant, for an admin; left out, of yourself.
    """

    kind: MemoryKind | None = None
    user_id: UserId | None = None


class MemoryBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A memory to keep, of the kind ``fact``.

    Attributes:
        text: what is to be remembered, not blank.
        metadata: the caller's own; kept and returned, never read.
    """

    text: MemoryText
    metadata: dict[str, Any] = {}


class MemoryChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A memory as it is to be.

    Attributes:
        text: what is to be remembered, not blank.
        metadata: left out, it stays as it is.
    """

    text: MemoryText
    metadata: dict[str, Any] | None = None


class SearchBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to look for among the memories.

    Attributes:
        query: any text; its words are looked for.
        limit: at most so many.
    """

    query: Annotated[str, Meta(min_length=1, max_length=MAX_QUERY_CHARS)]
    limit: Annotated[int, Meta(ge=1, le=100)] = 10


class Cleared(msgspec.Struct, frozen=True):
    """How many memories were deleted."""

    deleted: int


class WorkingMemoryView(msgspec.Struct, frozen=True, kw_only=True):
    """A user's working memory with an agent.

    Attributes:
        document: the JSON object; the agent's template until it is first changed.
        max_bytes: what it may be as JSON.
    """

    document: dict[str, Any]
    max_bytes: int


async def list_memories(call: Call[None, MemoriesQuery]) -> Page[StoredMemory]:
    """The user's memories, newest first."""
    query = call.query
    scope = await find_scope(call, query.user_id)
    items, total = await call.services.read(_page, scope, query)
    return query.page(items, total)


def _page(connection: Connection, scope: Scope, query: MemoriesQuery) -> tuple[list[StoredMemory], int]:
    found = memories.list_memories(connection, scope, query.kind, query.limit, query.offset)
    return found, memories.count_memories(connection, scope, query.kind)


async def create_memory(call: Call[MemoryBody, UserQuery]) -> Reply:
    """Keep a fact."""
    scope = await find_scope(call, call.query.user_id)
    memory = await call.services.write(_add, scope, _text(call.body.text), call.body.metadata, call.services.now())
    return Reply(memory, {"Location": f"{API}/agents/{scope.agent_id}/memories/{memory.id}"})


def _add(connection: Connection, scope: Scope, text: str, metadata: dict[str, Any], now: str) -> StoredMemory:
    return memories.add_memory(connection, scope, random_run_id(), text, "fact", now, metadata=metadata)


async def get_memory(call: Call[None, UserQuery]) -> StoredMemory:
    """One memory."""
    scope = await find_scope(call, call.query.user_id)
    return _there(call, await call.services.read(memories.find_memory, scope, call.ids["memory_id"]))


async def replace_memory(call: Call[MemoryChange, UserQuery]) -> StoredMemory:
    """Change a memory's text, and its metadata if that is given."""
    scope = await find_scope(call, call.query.user_id)
    change = (_text(call.body.text), call.body.metadata, call.services.now())
    return _there(call, await call.services.write(memories.update_memory, scope, call.ids["memory_id"], *change))


async def delete_memory(call: Call[None, UserQuery]) -> None:
    """Forget one."""
    scope = await find_scope(call, call.query.user_id)
    if not await call.services.write(memories.delete_memory, scope, call.ids["memory_id"]):
        raise not_found("memory", call.ids["memory_id"])


async def clear_memories(call: Call[None, UserQuery]) -> Cleared:
    """Forget all."""
    scope = await find_scope(call, call.query.user_id)
    return Cleared(await call.services.write(memories.clear_memories, scope))


async def search_memories(call: Call[SearchBody, UserQuery]) -> list[StoredMemory]:
    """What has the query's words, best first."""
    scope = await find_scope(call, call.query.user_id)
    return await call.services.read(memories.search_memories, scope, call.body.query, call.body.limit)


def _text(text: str) -> str:
    if not text.strip():
        raise ApiError(422, "VALIDATION_ERROR", "text is blank", {"field": "text"})
    return text.strip()


def _there(call: Call[Any, Any], memory: StoredMemory | None) -> StoredMemory:
    if memory is None:
        raise not_found("memory", call.ids["memory_id"])
    return memory


async def get_working_memory(call: Call[None, UserQuery]) -> WorkingMemoryView:
    """The document as it is."""
    scope, settings = await _working_memory(call)
    document = await call.services.read(read_document, scope, settings)
    return WorkingMemoryView(document=document, max_bytes=settings.max_bytes)


async def replace_working_memory(call: Call[dict[str, Any], UserQuery]) -> WorkingMemoryView:
    """Put another document in its place."""
    scope, settings = await _working_memory(call)
    return await _changed(call, settings, replace_document, scope)


async def patch_working_memory(call: Call[dict[str, Any], UserQuery]) -> WorkingMemoryView:
    """Change it by a JSON merge patch (RFC 7396)."""
    scope, settings = await _working_memory(call)
    return await _changed(call, settings, patch_document, scope)


async def delete_working_memory(call: Call[None, UserQuery]) -> None:
    """Begin anew with the agent's template."""
    scope, _ = await _working_memory(call)
    await call.services.write(working_memories.clear_document, scope)


async def _working_memory(call: Call[Any, UserQuery]) -> tuple[Scope, WorkingMemorySettings]:
    settings = record_of(await find_listed(call)).working_memory
    if settings is None:
        raise not_found("working memory of agent", call.ids["agent_id"])
    return await find_scope(call, call.query.user_id), settings


async def _changed(
    call: Call[dict[str, Any], UserQuery], settings: WorkingMemorySettings, change: Any, scope: Scope
) -> WorkingMemoryView:
    try:
        done: WorkingMemoryChange = await call.services.write(change, scope, settings, call.body, call.services.now())
    except MemoryRefusedError as error:
        raise ApiError(422, "VALIDATION_ERROR", str(error)) from error
    return WorkingMemoryView(document=done.document, max_bytes=settings.max_bytes)


_ALL = f"{API}/agents/{{agent_id}}/memories"
_ONE = f"{_ALL}/{{memory_id}}"
_WORKING = f"{API}/agents/{{agent_id}}/working-memory"
_DOCUMENT = {"name": "Ada", "goals": ["learn trio"]}
_FACT = {"text": "Her name is Ada."}

ROUTES = (
    Route(
        method="GET",
        path=_ALL,
        handler=list_memories,
        summary="What the agent remembers of you, newest first",
        tag="Memory",
        query=MemoriesQuery,
        answer=Page[StoredMemory],
    ),
    Route(
        method="POST",
        path=_ALL,
        handler=create_memory,
        summary="Let the agent remember a fact",
        tag="Memory",
        body=MemoryBody,
        query=UserQuery,
        answer=StoredMemory,
        status=201,
        answer_headers={"Location": "The memory's path."},
        example=_FACT,
    ),
    Route(
        method="DELETE",
        path=_ALL,
        handler=clear_memories,
        summary="Let the agent forget all of you; the history stays",
        tag="Memory",
        query=UserQuery,
        answer=Cleared,
    ),
    Route(
        method="POST",
        path=f"{_ALL}/search",
        handler=search_memories,
        summary="Search the memories by words, best first",
        tag="Memory",
        body=SearchBody,
        query=UserQuery,
        answer=list[StoredMemory],
        example={"query": "name"},
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=get_memory,
        summary="One memory",
        tag="Memory",
        query=UserQuery,
        answer=StoredMemory,
    ),
    Route(
        method="PUT",
        path=_ONE,
        handler=replace_memory,
        summary="Change a memory",
        tag="Memory",
        body=MemoryChange,
        query=UserQuery,
        answer=StoredMemory,
        example=_FACT,
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete_memory,
        summary="Let the agent forget one memory",
        tag="Memory",
        query=UserQuery,
        status=204,
    ),
    Route(
        method="GET",
        path=_WORKING,
        handler=get_working_memory,
        summary="Your working memory with the agent",
        tag="Memory",
        query=UserQuery,
        answer=WorkingMemoryView,
    ),
    Route(
        method="PUT",
        path=_WORKING,
        handler=replace_working_memory,
        summary="Put another document in place of the working memory",
        tag="Memory",
        body=dict[str, Any],
        query=UserQuery,
        answer=WorkingMemoryView,
        example=_DOCUMENT,
    ),
    Route(
        method="PATCH",
        path=_WORKING,
        handler=patch_working_memory,
        summary="Change the working memory by a merge patch (RFC 7396)",
        tag="Memory",
        body=dict[str, Any],
        body_media_types=(MERGE_PATCH_MEDIA_TYPE, JSON_MEDIA_TYPE),
        query=UserQuery,
        answer=WorkingMemoryView,
        example={"goals": None},
    ),
    Route(
        method="DELETE",
        path=_WORKING,
        handler=delete_working_memory,
        summary="Begin the working memory anew, with the agent's template",
        tag="Memory",
        query=UserQuery,
        status=204,
    ),
)
