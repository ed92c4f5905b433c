"""What the routes work on: all that the composition root made, handed over as one."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import trio

from engine import BasicAgent, RunSupervisor
from engine.trace import InMemoryTraces

from .errors import RETRY_AFTER_SECONDS, ApiError

STORE_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Services:
    """What the routes work on. Closing any of it is its maker's.

    Attributes:
        agents: by id, for everyone: agents that are made already, of a program that needs no records of them.
        supervisor: of this worker's runs.
        resume_grace: the default, in seconds.
        traces: kept of runs; None for a server that keeps none.
    """

    agents: Mapping[str, BasicAgent]
    supervisor: RunSupervisor
    resume_grace: float = 5.0
    traces: InMemoryTraces | None = None


async def within_store_deadline(asked: Awaitable[T]) -> T:
    """What the store answers within ``STORE_SECONDS``.

    Raises:
        ApiError: 503, it does not.
    """
    with trio.move_on_after(STORE_SECONDS):
        return await asked
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    raise ApiError(503, "SERVICE_UNAVAILABLE", "the store does not answer", headers=headers)
