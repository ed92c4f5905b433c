"""Which agent a request means, and whose things with it: found for the caller alone, or not there."""

from __future__ import annotations

from typing import Any

import msgspec
import structlog

from engine import BasicAgent
from engine.memory import Owner

from .agent_views import may_see_whole
from .auth import resolve_user
from .availability import or_unavailable
from .directory import ListedAgent, may_change
from .errors import ApiError, not_found
from .factory import AgentConfigError
from .records import AgentRecord
from .routing import Call
from .store.rows import Scope, StoredAgent

_logger = structlog.get_logger("lumos")


async def find_listed(call: Call[Any, Any]) -> ListedAgent:
    """The agent that the path names, as a record.

    Raises:
        ApiError: 404, there is none that the caller may use; 503, the store does not answer.
    """
    agent_id = call.ids["agent_id"]
    directory = call.services.directory
    agent: ListedAgent | None = None
    if directory is not None:
        known = directory.find_operators(agent_id)
        agent = known or await or_unavailable(directory.find, call.caller, agent_id)
    if agent is None:
        raise not_found("agent", agent_id)
    return agent


async def find_changeable(call: Call[Any, Any]) -> StoredAgent:
    """The stored agent that the path names, if the caller may change it.

    Raises:
        ApiError: 404, there is none that the caller may use; 403, it is the tenant's; 409, it is the operator's.
    """
    agent = await find_listed(call)
    if isinstance(agent, AgentRecord):
        message = f"agent {agent.id!r} is built in or in the agents file: only the operator changes it, there"
        raise ApiError(409, "CONFLICT", message)
    if not may_change(call.caller, agent):
        raise ApiError(403, "FORBIDDEN", "the agent is the whole tenant's: only an admin may change it")
    return agent


async def find_chat_agent(call: Call[Any, Any], user_id: str) -> BasicAgent:
    """The agent that the path names, made for that user.

    Raises:
        ApiError: 404, there is none that the caller may use; 422, it cannot be made any more; 503, the store does not
            answer.
    """
    services, tenant_id, caller = call.services, call.caller.tenant_id, call.caller
    made = services.agents.get(call.ids["agent_id"])
    if made is not None:
        return msgspec.structs.replace(made, owner=Owner(tenant_id=tenant_id, user_id=user_id))
    agent = await find_listed(call)
    if services.factory is None:
        raise not_found("agent", call.ids["agent_id"])
    if isinstance(agent, StoredAgent) and services.tool_policy.refused(caller, agent.record.tools):
        raise _unusable(call, agent, "it names tools that the operator does not allow (any more)")
    try:
        return services.factory.create_chat_agent(agent, user_id, tenant_id, key_id=caller.key_id)
    except AgentConfigError as error:  # its record was fine once: a key or a tool is gone since
        raise _unusable(call, agent, str(error)) from error


def _unusable(call: Call[Any, Any], agent: ListedAgent, reason: str) -> ApiError:
    """Why is for who could change it: it names variables, hosts and tools."""
    agent_id = record_of(agent).id
    _logger.warning("agent.unusable", agent_id=agent_id, tenant_id=call.caller.tenant_id, reason=reason)
    told = call.caller.admin and may_see_whole(call.caller, agent)
    message = reason if told else f"agent {agent_id!r} cannot be used at present: whoever runs it has to see to it"
    return ApiError(422, "AGENT_UNUSABLE", message)


def record_of(agent: ListedAgent) -> AgentRecord:
    """The agent's record, whoever keeps it."""
    return agent if isinstance(agent, AgentRecord) else agent.record


async def find_scope(call: Call[Any, Any], user_id: str | None) -> Scope:
    """Whose memories with the path's agent the request means: the caller's, or those of the user an admin names.

    Raises:
        ApiError: 404, there is no such agent for the caller; 403 and 422 for a ``user_id`` that cannot be.
    """
    await find_listed(call)
    return Scope(call.caller.tenant_id, resolve_user(call.caller, user_id), call.ids["agent_id"])
