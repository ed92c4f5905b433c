"""A stand-in for a simulated world: the harness's server in memory, a simulated vendor, and clients to send in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from providers.openai_chat import OpenAIChatProvider
from server.simulation.clients import act_client
from server.simulation.observations import Observations, Response
from server.simulation.plan import AnswerPlan, ClientPlan, Plan, ReplyPlan, StepPlan, VendorPlan
from server.simulation.replies import reply_text
from server.simulation.trace import Trace
from server.simulation.vendors import Vendor
from tests.harness.world import LUMOS, World, open_world

REPLY = ReplyPlan(pieces=20, first_after=0.5, seconds=1.9)
"""A piece each tenth of a second from 0.5 to 2.4 s, nothing else."""

TEXT = reply_text(REPLY)


class ClientScene:
    """What clients need of a world, over the harness's one."""

    def __init__(self, world: World, *, workers: int = 1) -> None:
        self.world = world
        self.network = world.network
        self.observations = Observations()
        self.trace = Trace()
        self.plan = Plan(seed=1, workers=workers)
        self.worker_hosts = {0: LUMOS}

    def address(self, worker: int) -> tuple[str, int]:
        return self.worker_hosts.get(worker, ("nobody", 80))

    def key_header(self, user: int) -> dict[str, str]:
        return {}

    def agent_id(self, number: int) -> str:
        return f"agent{number}"

    async def act(self, *steps: StepPlan, number: int = 0, **plan: Any) -> list[Response]:
        """Act a client, and return all that it was answered."""
        await act_client(self, number, ClientPlan(steps=steps, **plan))
        return self.observations.responses


@asynccontextmanager
async def open_scene(*answers: AnswerPlan, workers: int = 1, window: int = 65_536) -> AsyncIterator[ClientScene]:
    """A world with two agents that ask the same vendor."""
    async with open_world(window=window) as world:
        scene = ClientScene(world, workers=workers)
        plan = VendorPlan(answers=answers or (AnswerPlan(reply=REPLY),))
        vendor = Vendor(plan, 0, scene.observations.calls, scene.trace)
        vendor.start(world.nursery, world.network.listen("vendor", 80))
        for number in range(2):
            provider = OpenAIChatProvider(base_url="http://vendor/v1", api_key="k", client=world.model_client)
            world.add_agent(f"agent{number}", provider)
        yield scene
        await trio.testing.wait_all_tasks_blocked()
        still_open = [c for c in world.network.open_connections(LUMOS[0]) if c.client.closed_at is None]
        assert not still_open, "clients close what they open"


def said(*responses: Response) -> str:
    """The text of what these streams brought, one after the other."""
    events = [data(frame.frame) for response in responses for frame in response.frames]
    return "".join(event["content"] for event in events if event["chunk_type"] == "content")


def data(frame: bytes) -> Any:
    """The frame's data."""
    return msgspec.json.decode(frame.partition(b"data: ")[2])


def kinds(response: Response) -> list[str]:
    """What a stream brought."""
    return [data(frame.frame)["chunk_type"] for frame in response.frames]


def numbers(*responses: Response) -> list[int]:
    """The numbers of the frames of these streams."""
    return [int(frame.id.rpartition(".")[2]) for response in responses for frame in response.frames]
