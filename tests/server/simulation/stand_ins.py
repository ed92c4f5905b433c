"""A plain client for worlds of tests: asks, reads to the end, and tells what came."""

from __future__ import annotations

import trio

from server.simulation.observations import Response
from server.simulation.plan import ClientPlan
from server.simulation.tools import simulated_tools
from server.simulation.vendors import Vendor
from server.simulation.world import Cast, World

_REQUEST = (
    "POST /api/v1/agents/{agent}/chat/lumosai/stream HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    "Connection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
)


async def act_reader(world: World, number: int, plan: ClientPlan) -> None:
    """Ask the first agent, and read what comes until it ends, however that is."""
    response = Response(number, "chat", plan.worker, trio.current_time())
    world.observations.responses.append(response)
    host, port = world.address(plan.worker)
    try:
        stream = await world.network.connect(host, port)
    except OSError:
        response.ending, response.ended_at = "broken", trio.current_time()
        return
    headers = "".join(f"{name}: {value}\r\n" for name, value in world.key_header(plan.user).items())
    body = '{"message":"hello"}'
    agent = world.agent_id(plan.agents[0])
    request = _REQUEST.format(agent=agent, host=host, headers=headers, length=len(body), body=body)
    got = b""
    try:
        await stream.send_all(request.encode())
        while data := await stream.receive_some():
            got += data
        response.ending = "left"
    except trio.BrokenResourceError:
        response.ending = "broken"
    stream.close()
    response.ended_at = trio.current_time()
    response.body = got
    world.trace.note(f"client{number}", response.ending, bytes=len(got), got=got)


READERS = Cast(make_vendor=Vendor, make_tools=simulated_tools, act_client=act_reader)
