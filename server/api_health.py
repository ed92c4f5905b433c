"""Health: whether the server lives, and whether it takes new runs."""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import draining
from .routing import Call, Route


class Alive(msgspec.Struct, frozen=True):
    """The server answers."""

    status: Literal["ok"]


class Ready(msgspec.Struct, frozen=True):
    """The server takes new runs."""

    status: Literal["ok"]
    active_runs: int


async def live(_: Call[None, None]) -> Alive:
    """Whether the process serves."""
    return Alive("ok")


async def ready(call: Call[None, None]) -> Ready:
    """Whether the server takes new runs."""
    if call.services.supervisor.draining:
        raise draining()
    return Ready("ok", call.services.supervisor.active_runs)


ROUTES = (
    Route(
        method="GET",
        path="/health/live",
        handler=live,
        summary="Whether the process serves",
        tag="Server",
        answer=Alive,
        open=True,
        wrapped=False,
    ),
    Route(
        method="GET",
        path="/health/ready",
        handler=ready,
        summary="Whether the server takes new runs",
        tag="Server",
        answer=Ready,
        refusals=(503,),
        open=True,
        wrapped=False,
    ),
)
