"""Agents: those that the operator declared for everybody, and those of a tenant and its users."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any

from msgspec import Meta
from sqlalchemy import Connection

from .agent_access import find_changeable, find_listed
from .agent_views import AgentSummary, AgentView, agent_view, fields_of
from .availability import or_unavailable
from .directory import ListedAgent
from .errors import ApiError, not_found
from .factory import AgentConfigError
from .paging import Page, PageQuery
from .provider_policy import check_record
from .records import AGENT_ID, AgentRecord
from .routing import API, Call, Reply, Route
from .store import agents as agent_rows
from .store.errors import AlreadyThereError
from .store.rows import StoredAgent
from .tool_policy import check_tools

EXAMPLE = {"id": "my-agent", "llm_config": {"provider": "replay", "model": "gpt4o-short"}, "tools": ["calculator"]}

MAX_DEADLINE = 3600.0
"""Seconds that an agent may wait for anything, or run; those of the operator's own are as he wants them."""

_ETAG = re.compile(r'"(\d{1,18})"')


class AgentBody(AgentRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An agent as a request writes it down.

    Attributes:
        id: what URLs and the OpenAI-compatible ``model`` field name it by; left out, a new agent gets one.
    """

    id: Annotated[str, Meta(pattern=f"^({AGENT_ID})?$")] = ""

    def __post_init__(self) -> None:
        self.record(self.id or "unnamed")  # what a record may not be, a body may not

    def record(self, agent_id: str) -> AgentRecord:
        """The record under that id.

        Raises:
            ApiError: 422, it is for another id.
        """
        if self.id not in ("", agent_id):
            raise ApiError(422, "VALIDATION_ERROR", "the id is not that of the path", {"field": "id"})
        return AgentRecord(**fields_of(self) | {"id": agent_id})


class _ChangedError(Exception):
    """The agent has another revision than the one that is to be changed."""


async def create_agent(call: Call[AgentBody, None]) -> Reply:
    """Keep a new agent: an admin's is for the whole tenant, a user's is his own."""
    record = call.body.record(call.body.id or f"agent-{secrets.token_hex(8)}")
    _check(call, record)
    directory, caller = call.services.directory, call.caller
    owner = None if caller.admin else caller.user_id
    try:
        if record.id in call.services.agents or (directory is not None and directory.is_operators(record.id)):
            raise AlreadyThereError(f"there is an agent {record.id!r} already")
        stored = await call.services.write(
            agent_rows.create_agent, caller.tenant_id, owner, record, call.services.now()
        )
    except AlreadyThereError as error:
        raise ApiError(409, "CONFLICT", str(error), {"field": "id"}) from error
    return Reply(_shown(call, stored), {"Location": f"{API}/agents/{record.id}", **_etag(stored)})


async def list_agents(call: Call[None, PageQuery]) -> Page[AgentView | AgentSummary]:
    """The agents that the caller may use."""
    query, directory = call.query, call.services.directory
    if directory is None:
        return query.page([], 0)
    found, total = await or_unavailable(directory.list, call.caller, query.limit, query.offset)
    return query.page([_shown(call, agent) for agent in found], total)


async def get_agent(call: Call[None, None]) -> Reply:
    """One agent."""
    agent = await find_listed(call)
    return Reply(_shown(call, agent), _etag(agent))


async def replace_agent(call: Call[AgentBody, None]) -> Reply:
    """Put another record in place of the agent's."""
    record = call.body.record(call.ids["agent_id"])
    await find_changeable(call)
    _check(call, record)
    try:
        stored = await call.services.write(
            _replace, call.caller.tenant_id, record, call.services.now(), _wanted_revisions(call)
        )
    except _ChangedError as error:
        raise _changed() from error
    if stored is None:
        raise not_found("agent", record.id)
    return Reply(_shown(call, stored), _etag(stored))


async def delete_agent(call: Call[None, None]) -> None:
    """Delete the agent with all that it remembers, of all its users."""
    await find_changeable(call)
    tenant_id, agent_id = call.caller.tenant_id, call.ids["agent_id"]
    try:
        deleted = await call.services.write(_delete, tenant_id, agent_id, _wanted_revisions(call))
    except _ChangedError as error:
        raise _changed() from error
    if not deleted:
        raise not_found("agent", agent_id)


def _shown(call: Call[Any, Any], agent: ListedAgent) -> AgentView | AgentSummary:
    return agent_view(agent, call.caller, call.services.tool_policy.refused)


def _check(call: Call[Any, Any], record: AgentRecord) -> None:
    """Refuse a record that would send secrets where the caller may not, or of which no agent can be made."""
    services = call.services
    check_tools(record, call.caller, services.tool_policy)
    check_record(record, call.caller, services.policy, services.environment)
    if not call.caller.operator:
        _check_deadlines(record)
    if services.factory is None:
        return
    try:
        services.factory.check(record)
    except AgentConfigError as error:
        raise ApiError(422, "VALIDATION_ERROR", str(error), {"field": error.field}) from error


def _check_deadlines(record: AgentRecord) -> None:
    """A run of a tenant's holds its place for this long at most."""
    for name in record.deadlines.__struct_fields__:
        if getattr(record.deadlines, name) > MAX_DEADLINE:
            field = f"deadlines.{name}"
            details = {"field": field, "allowed": MAX_DEADLINE}
            raise ApiError(422, "VALIDATION_ERROR", f"{field} is over {MAX_DEADLINE:g} s", details)


def _replace(
    connection: Connection, tenant_id: str, record: AgentRecord, now: str, wanted: frozenset[int] | None
) -> StoredAgent | None:
    """In one transaction; the revision is compared once the row is changed, and so cannot change in between."""
    stored = agent_rows.replace_agent(connection, tenant_id, record, now)
    if stored is not None and wanted is not None and stored.revision - 1 not in wanted:
        raise _ChangedError
    return stored


def _delete(connection: Connection, tenant_id: str, agent_id: str, wanted: frozenset[int] | None) -> bool:
    if wanted is not None:
        stored = agent_rows.find_agent(connection, tenant_id, agent_id)
        if stored is not None and stored.revision not in wanted:
            raise _ChangedError
    return agent_rows.delete_agent(connection, tenant_id, agent_id)


def _wanted_revisions(call: Call[Any, Any]) -> frozenset[int] | None:
    """The revisions that ``If-Match`` names; None for any."""
    tags = ",".join(call.request.headers.getlist("If-Match")).strip()
    return None if tags in ("", "*") else frozenset(int(number) for number in _ETAG.findall(tags))


def _etag(agent: ListedAgent) -> dict[str, str]:
    return {} if isinstance(agent, AgentRecord) else {"ETag": f'"{agent.revision}"'}


def _changed() -> ApiError:
    return ApiError(412, "PRECONDITION_FAILED", "the agent was changed in between: it is not the one of If-Match")


_ONE = f"{API}/agents/{{agent_id}}"
_IF_MATCH = {"If-Match": "The agent's ETag: the change is made only if nobody changed it since."}
_ETAG_HEADER = {"ETag": "The agent's revision, for `If-Match`; none for the server's agents."}

ROUTES = (
    Route(
        method="POST",
        path=f"{API}/agents",
        handler=create_agent,
        summary="Keep a new agent: an admin's is for all of the tenant, a user's is his own",
        tag="Agents",
        body=AgentBody,
        answer=AgentView,
        status=201,
        refusals=(409,),
        answer_headers={"Location": "The agent's path.", **_ETAG_HEADER},
        example=EXAMPLE,
    ),
    Route(
        method="GET",
        path=f"{API}/agents",
        handler=list_agents,
        summary="The agents that you may use: the server's, the tenant's, yours",
        tag="Agents",
        query=PageQuery,
        answer=Page[AgentView | AgentSummary],
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=get_agent,
        summary="One agent: whole if you may change it, else a summary",
        tag="Agents",
        answer=AgentView | AgentSummary,
        answer_headers=_ETAG_HEADER,
    ),
    Route(
        method="PUT",
        path=_ONE,
        handler=replace_agent,
        summary="Put another record in place of the agent's",
        tag="Agents",
        body=AgentBody,
        answer=AgentView,
        refusals=(409, 412),
        headers=_IF_MATCH,
        answer_headers=_ETAG_HEADER,
        example={name: value for name, value in EXAMPLE.items() if name != "id"},
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete_agent,
        summary="Delete an agent with all that it remembers, of all its users",
        tag="Agents",
        status=204,
        refusals=(409, 412),
        headers=_IF_MATCH,
    ),
)
