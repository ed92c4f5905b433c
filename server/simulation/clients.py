"""Simulated clients: each acts its plan, and everything that it hears goes into the world's observations."""

from __future__ import annotations

import trio

from .asking import Asker, ClientWorld
from .hostile_clients import attack_worker
from .plan import ClientPlan
from .reading_clients import ReadingClient
from .socket_clients import SocketClient

__all__ = ["CLIENT_SECONDS", "ClientWorld", "act_client"]

CLIENT_SECONDS = 900.0
"""What a client may take altogether. Its answers that have not ended by then have no ending, unless it reads slowly."""


async def act_client(world: ClientWorld, number: int, plan: ClientPlan) -> None:
    """Be the client of that number, from ``plan.at`` on.

    Raises:
        BadAnswerError: a worker answered with what is no HTTP; in an exception group.
    """
    await trio.sleep_until(plan.at)
    asker = Asker(world, number, plan)
    try:
        with trio.move_on_after(CLIENT_SECONDS):
            await _act(asker)
    finally:
        asker.close()


async def _act(asker: Asker) -> None:
    if asker.plan.manner == "hostile":
        await attack_worker(asker)
        return
    async with trio.open_nursery() as nursery:
        if asker.plan.manner == "socket":
            await SocketClient(asker, nursery).act()
        else:
            await ReadingClient(asker, nursery).act()
