"""What is there for the caller: who he is to the server, and the tools that his agents may name."""

from __future__ import annotations

from math import isfinite

import msgspec

from .principal import KeyLimits
from .routing import API, Call, Route


class LimitsView(msgspec.Struct, frozen=True, kw_only=True):
    """What the key may use; null is without limit."""

    requests_per_minute: float | None
    concurrent_runs: float | None
    tokens_per_day: float | None


class CallerView(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks.

    Attributes:
        admin: may act for every user of the tenant, and change the tenant's agents.
        key_id: of the API key; null for the local user of a server without keys.
    """

    tenant_id: str
    user_id: str
    admin: bool
    key_id: str | None
    limits: LimitsView


class ToolView(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that an agent's record may name."""

    name: str
    description: str


async def get_me(call: Call[None, None]) -> CallerView:
    """Who the server takes the caller for."""
    caller = call.caller
    return CallerView(
        tenant_id=caller.tenant_id,
        user_id=caller.user_id,
        admin=caller.admin,
        key_id=caller.key_id,
        limits=_limits(caller.limits),
    )


def _limits(limits: KeyLimits) -> LimitsView:
    return LimitsView(
        **{name: value if isfinite(value) else None for name, value in msgspec.structs.asdict(limits).items()}
    )


async def list_tools(call: Call[None, None]) -> list[ToolView]:
    """What records of the caller's may name, of what can be used now."""
    services = call.services
    usable = {} if services.tools is None else services.tools.usable()
    refused = set(services.tool_policy.refused(call.caller, usable))
    return [
        ToolView(name=name, description=tool.spec.description) for name, tool in usable.items() if name not in refused
    ]


ROUTES = (
    Route(
        method="GET",
        path=f"{API}/me",
        handler=get_me,
        summary="Who the server takes you for, and what you may use",
        tag="You",
        answer=CallerView,
    ),
    Route(
        method="GET",
        path=f"{API}/tools",
        handler=list_tools,
        summary="The tools that your agents may name",
        tag="You",
        answer=list[ToolView],
    ),
)
