"""Health: whether the server lives, and whether it takes new runs."""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import RETRY_AFTER_SECONDS, ApiError, draining
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
    """Whether the server takes new runs: it does not shut down, and its store answers."""
    if call.services.supervisor.draining:
        raise draining()
    database = call.services.database
    if database is not None and not await call.services.store_probe.answers(database):
        raise ApiError(
            503,
            "SERVICE_UNAVAILABLE",
            "the store does not answer",
            {"not_ready": ["store"]},
            {"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
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
