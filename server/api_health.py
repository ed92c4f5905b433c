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
    """The server takes new runs.

    Attributes:
        shared_log: whether other workers' runs can be had; null of a server that is alone. Its own go on without.
        queued_runs: starts that wait for one of the worker's places.
        saturated: whether all places are taken. That is no refusal yet: it waits, and streams can be read.
    """

    status: Literal["ok"]
    active_runs: int
    queued_runs: int
    saturated: bool
    shared_log: Literal["ok", "away"] | None = None


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
    admission, shared = call.services.admission, call.services.shared_log
    return Ready(
        "ok",
        call.services.supervisor.active_runs,
        queued_runs=0 if admission is None else admission.queued,
        saturated=admission is not None and admission.saturated,
        shared_log=None if shared is None else "ok" if shared.available else "away",
    )


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
