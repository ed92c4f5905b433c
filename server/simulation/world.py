"""A simulated world: a network, vendors, workers, clients and a schedule of what befalls them, built from a plan."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import trio

from engine import Deadlines
from engine.tools import Tool
from providers.registry import ModelConfig
from server.admission import AdmissionLimits
from server.keys import make_key
from server.principal import KeyLimits
from server.records import AgentRecord, MemorySettings
from server.run_uploads import ENDED_KEPT_SECONDS, SharedLimits
from server.settings import ServerSettings
from server.shared_log import SharedLog
from server.store import keys as key_rows
from server.store.times import time_text
from server.testing.memory_network import MemoryListener, MemoryNetwork
from server.tool_registry import ToolRegistry

from .determinism import wall_clock
from .memory_link import WorkerLinks
from .memory_redis import MemoryRedis
from .observations import Observations, UpstreamCall
from .plan import AgentPlan, ClientPlan, EventPlan, Plan, ToolPlan, VendorPlan, Wire
from .trace import Trace
from .worker import Life
from .worker_store import SimulatedStore

UPSTREAM_KEY = "sk-simulated-0123456789abcdefghijklmnopqrstuvwxyz"
"""The key that workers send to vendors: a secret, which nobody else is ever to see."""

SHARE_SECRET = "signs-share-links-0123456789"
KEY_VARIABLE = "SIMULATED_API_KEY"
TENANT = "tenant"

PATIENCE_SECONDS = 3600.0
"""How long after the plan's end clients may still be at it; who is then hangs."""

SETTLING_SECONDS = ENDED_KEPT_SECONDS + 15.0
"""What everything has in the end that goes by itself: idle connections, what is kept to be written again."""

_PROVIDERS: Mapping[Wire, str] = {"openai": "openai_compatible", "anthropic": "anthropic", "gemini": "gemini"}


class VendorActor(Protocol):
    """What the world needs of ``vendors.Vendor``."""

    def start(self, nursery: trio.Nursery, listener: MemoryListener) -> None:
        """Serve."""
        ...

    async def admit(self) -> None:
        """Let a worker connect, or raise OSError, or never return."""
        ...


MakeVendor: TypeAlias = Callable[[VendorPlan, int, list[UpstreamCall], Trace], VendorActor]
MakeTools: TypeAlias = Callable[[Sequence[ToolPlan], Trace], dict[str, Tool]]


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Who acts a plan beside the workers: a test may have others act."""

    make_vendor: MakeVendor
    make_tools: MakeTools
    act_client: Callable[[World, int, ClientPlan], Awaitable[None]]


def usual_cast() -> Cast:
    """The vendors, tools and clients of this package."""
    return Cast(
        make_vendor=_ours("vendors", "Vendor"),
        make_tools=_ours("tools", "simulated_tools"),
        act_client=_ours("clients", "act_client"),
    )


def _ours(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"server.simulation.{module}"), name)


class World:
    """All of it. ``run`` acts the plan; the rest is for who acts in it.

    Attributes:
        problems: what went wrong in the acting itself: workers or clients that crashed or hang.
        redis: what the workers share; None in a world without.
    """

    def __init__(self, plan: Plan, cast: Cast) -> None:
        self.plan = plan
        self.cast = cast
        self.network = MemoryNetwork(latency=plan.latency)
        self.trace = Trace()
        self.observations = Observations()
        self.problems: list[str] = []
        self.store = SimulatedStore()
        self.keyed = plan.keyed
        self.environment = {KEY_VARIABLE: UPSTREAM_KEY}
        self.settings = _settings(plan)
        self.agents = [_record(plan, number) for number in range(len(plan.agents))]
        simulated = cast.make_tools(plan.tools, self.trace)
        self.tools = ToolRegistry(built_in=simulated, plugins=tuple)
        self.vendors = [
            cast.make_vendor(vendor, number, self.observations.calls, self.trace)
            for number, vendor in enumerate(plan.vendors)
        ]
        self.redis = MemoryRedis() if plan.shared else None
        self.lives: list[list[Life]] = [[] for _ in range(plan.workers)]
        self._keys = self._make_keys() if plan.keyed else {}
        self.observations.secrets = (UPSTREAM_KEY, *self._keys.values(), SHARE_SECRET)
        self._extra_clients = 0
        self._acting = 0
        self._nobody_acts = trio.Event()

    # For who acts in it

    def address(self, worker: int) -> tuple[str, int]:
        """Where the worker listens: its host and its port. The host is one that a server without keys lets in."""
        return f"worker{worker}.localhost", 80

    def key_header(self, user: int) -> dict[str, str]:
        """What the user's requests show; nothing for user 0, and in a world without keys."""
        return {"Authorization": f"Bearer {self._keys[user]}"} if user in self._keys else {}

    def agent_id(self, number: int) -> str:
        """What the agent is called in URLs."""
        return f"agent{number}"

    def is_alive(self, worker: int) -> bool:
        """Whether the worker's process is there."""
        lives = self.lives[worker]
        return bool(lives) and lives[-1].alive

    # For workers

    def open_shared_log(self, life: Life) -> SharedLog | None:
        """See ``worker.Surroundings``."""
        if self.redis is None:
            return None
        limits = SharedLimits(lease=self.plan.lease, retention=self.plan.retention)
        life.links = WorkerLinks(self.redis)
        return SharedLog("redis://shared", life.name, limits, open_link=life.links)

    async def connect_upstream(self, life: Life, host: str, port: int, tls: bool) -> trio.abc.Stream:
        """See ``worker.Surroundings``."""
        number = host.removeprefix("vendor")
        if number.isdecimal() and int(number) < len(self.vendors):
            await self.vendors[int(number)].admit()
        stream = await self.network.connect(host, port, tls, client_host=life.name)
        if not life.alive:
            stream.reset()
            stream.close()
            raise ConnectionRefusedError("this process is dead")
        return stream

    # The acting

    async def run(self) -> None:
        """Act the plan to its end, and until every client is done, but not for ever. All is gone then."""
        async with trio.open_nursery() as nursery:
            for number, vendor in enumerate(self.vendors):
                vendor.start(nursery, self.network.listen(f"vendor{number}", 80))
            for worker in range(self.plan.workers):
                self._start(worker, nursery)
            for number, client in enumerate(self.plan.clients):
                self._send_in(nursery, number, client)
            nursery.start_soon(self._befall, nursery)
            await trio.sleep(self.plan.until)
            self._mend()
            with trio.move_on_after(PATIENCE_SECONDS) as limit:  # noqa: ASYNC912 - they may be done already
                while self._acting:
                    await self._nobody_acts.wait()
            if limit.cancelled_caught:
                self.problems.append(f"{self._acting} clients hang")
            await trio.sleep(self._seconds_to_settle())
            self._look_back()
            nursery.cancel_scope.cancel(reason="the end of the world")

    def _mend(self) -> None:
        """What is away comes back: what could not be kept meanwhile is to be kept in the end."""
        self.trace.note("world", "mended")
        self.store.away = False
        if self.redis is not None:
            self.redis.away = False

    def _seconds_to_settle(self) -> float:
        """What the last runs may still take, and are kept for, once nobody acts any more."""
        services = [life.services for life in self.all_lives() if life.alive and life.services is not None]
        busy = any(part.supervisor.active_runs for part in services)
        longest = max(agent.deadlines.total for agent in self.plan.agents) if busy else 0.0
        return longest + self.plan.resume_grace + self.plan.retention + SETTLING_SECONDS

    def _look_back(self) -> None:
        from .aftermath import what_batches_had, what_is_kept, what_is_left  # noqa: PLC0415 - they know the world

        self.observations.left_over += what_is_left(self)
        self.observations.kept = what_is_kept(self)
        self.observations.batches |= what_batches_had(self)
        for life in self.all_lives():
            if life.crash is not None:
                self.problems.append(f"{life.actor} crashed: {life.crash!r}")

    def all_lives(self) -> list[Life]:
        """Every life of every worker."""
        return [life for lives in self.lives for life in lives]

    def _start(self, worker: int, nursery: trio.Nursery) -> None:
        if not self.is_alive(worker):
            life = Life(self, worker, len(self.lives[worker]))
            self.lives[worker].append(life)
            nursery.start_soon(life.live, name=life.actor)

    def _send_in(self, nursery: trio.Nursery, number: int, client: ClientPlan) -> None:
        self._acting += 1
        nursery.start_soon(self._act_client, number, client, name=f"client{number}")

    async def _act_client(self, number: int, client: ClientPlan) -> None:
        try:
            await trio.sleep_until(client.at)
            await self.cast.act_client(self, number, client)
        except* Exception as crash:  # noqa: BLE001 - a bug of the simulation's own, to be told
            self.problems.append(f"client{number} crashed: {crash.exceptions!r}")
        finally:
            self._acting -= 1
            if not self._acting:
                self._nobody_acts.set()
                self._nobody_acts = trio.Event()

    async def _befall(self, nursery: trio.Nursery) -> None:
        for event in sorted(self.plan.events, key=lambda event: event.at):
            await trio.sleep_until(event.at)
            self.trace.note("world", event.act, number=event.number)
            self._happen(event, nursery)

    def _happen(self, event: EventPlan, nursery: trio.Nursery) -> None:
        match event.act:
            case "kill":
                self._kill(event.number % self.plan.workers)
            case "start":
                self._start(event.number % self.plan.workers, nursery)
            case "sigterm" | "sigterm_twice":
                self._sigterm(event.number % self.plan.workers, 2 if event.act == "sigterm_twice" else 1)
            case "store_away" | "store_back":
                self.store.away = event.act == "store_away"
            case "shared_away" | "shared_back" | "shared_forgets":
                self._change_shared(event)
            case "burst":
                self._burst(event.number, nursery)

    def _kill(self, worker: int) -> None:
        if self.is_alive(worker):
            self.observations.deaths.append((trio.current_time(), worker))
            self.lives[worker][-1].kill()

    def _sigterm(self, worker: int, times: int) -> None:
        if self.is_alive(worker):
            if not self.lives[worker][-1].signalled:
                self.observations.drains.append((trio.current_time(), worker))
            for _ in range(times):
                self.lives[worker][-1].signal()

    def _change_shared(self, event: EventPlan) -> None:
        if self.redis is None:
            return
        if event.act == "shared_forgets":
            self.redis.forget_last(1.0)
        self.redis.away = event.act == "shared_away"

    def _burst(self, count: int, nursery: trio.Nursery) -> None:
        for _ in range(count):
            number = len(self.plan.clients) + self._extra_clients
            self._extra_clients += 1
            agent = number % len(self.plan.agents)
            client = ClientPlan(
                worker=number % self.plan.workers, agents=(agent,), session=number, user=self._first_user()
            )
            self._send_in(nursery, number, client)

    def _first_user(self) -> int:
        return min(self._keys, default=0)

    def _make_keys(self) -> dict[int, str]:
        """Each user's key, in the store before anybody comes."""
        texts = {}
        engine = self.store.direct
        for user in sorted({client.user for client in self.plan.clients} - {0} or {1}):
            now = time_text(wall_clock())
            key, texts[user] = make_key(TENANT, f"user{user}", False, "", KeyLimits(), now)
            engine.do(key_rows.create_key, key)
        return texts


def _settings(plan: Plan) -> ServerSettings:
    admission = AdmissionLimits(runs=plan.max_runs, queue=plan.queue, queue_seconds=plan.queue_seconds)
    return ServerSettings(
        resume_grace=plan.resume_grace,
        retention=plan.retention,
        drain=plan.drain,
        lease=plan.lease,
        admission=admission,
        share_secret=SHARE_SECRET,
    )


def _record(plan: Plan, number: int) -> AgentRecord:
    agent = plan.agents[number]
    first, *others = [_model(plan, agent, vendor) for vendor in agent.vendors]
    deadlines = agent.deadlines
    return AgentRecord(
        id=f"agent{number}",
        llm_config=ModelConfig(**first, fallbacks=tuple(ModelConfig(**other) for other in others)),
        tools=agent.tools,
        max_steps=agent.max_steps,
        deadlines=Deadlines(
            total=deadlines.total,
            connect=deadlines.connect,
            first_token=deadlines.first_token,
            idle=deadlines.idle,
            tool=deadlines.tool,
        ),
        memory=MemorySettings(enabled=agent.memory),
    )


def _model(plan: Plan, agent: AgentPlan, vendor: int) -> dict[str, Any]:
    return {
        "provider": _PROVIDERS[plan.vendors[vendor].wire],
        "model": f"model{vendor}",
        "base_url": f"http://vendor{vendor}/v1",
        "api_key_env": KEY_VARIABLE,
        "retries": agent.retries,
    }
