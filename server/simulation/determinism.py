"""Runs an async function so that nothing but a seed decides what happens: time, scheduling, chance, wall clocks.

What our code takes as a parameter is passed. The rest is replaced for as long as a simulation runs, by ``_REPLACED``.
Neither hash seeds nor addresses decide anything: trio sorts what is to run by the order in which tasks were made.
"""

from __future__ import annotations

import gc
import random
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from math import inf
from pkgutil import resolve_name
from typing import Any, TypeVar

import trio
from trio._core import _run as trio_loop
from trio.lowlevel import current_root_task
from trio.testing import MockClock
from werkzeug.routing.rules import Rule

EPOCH = datetime(2026, 1, 1, 12, tzinfo=UTC)
"""What the wall clock says when a world begins."""

MAX_STEPS_WITHOUT_TIME = 200_000
"""How often the time may be asked for without its going on: a world that spins never ends by itself."""

T = TypeVar("T")


class StuckError(BaseException):
    """The world does nothing any more, or spins without its time going on; no ``except Exception`` gets it."""


class _ExactTime:
    """Virtual time that goes on when nothing can run, and notices when there is nowhere to go to.

    It jumps to each deadline itself: ``MockClock`` adds the seconds until then, and is a rounding error away from it.

    Attributes:
        world: cancelled once nothing goes on any more; what goes on even then breaks trio's loop.
        stuck: why it was cancelled.
    """

    def __init__(self) -> None:
        self.world = trio.CancelScope()
        self.stuck: StuckError | None = None
        self._now = 0.0
        self._asked = 0

    def clock(self) -> MockClock:
        """The clock that shows it: trio jumps on ``MockClock`` alone, which may have no subclasses."""
        clock = MockClock(autojump_threshold=0)
        vars(clock).update(
            current_time=self.current_time,
            deadline_to_sleep_time=self.deadline_to_sleep_time,
            jump=self.jump,
            _autojump=self.autojump,
        )
        return clock

    def current_time(self) -> float:
        """Virtual seconds since the beginning."""
        self._asked += 1
        if self._asked > MAX_STEPS_WITHOUT_TIME:
            self._give_up("the world spins")
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Real seconds; as long as something can run there is no waiting, and else it jumps."""
        return 0.0 if deadline <= self._now else 999_999_999.0

    def jump(self, seconds: float) -> None:
        """Go on by so many seconds."""
        self._now += seconds
        self._asked = 0

    def autojump(self) -> None:
        """Nothing can run: go on to the next deadline."""
        deadline: float = trio_loop.GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline()
        if deadline == inf:
            self._give_up("everybody waits for ever")
        elif deadline > self._now:
            self._now = deadline
            self._asked = 0

    def _give_up(self, why: str) -> None:
        self._asked = 0
        if self.stuck is not None:
            raise self.stuck
        self.stuck = StuckError(f"{why} at {self._now:.9f}")
        self.world.cancel(reason=why)


class Chance:
    """Random numbers of a seed, a stream for each purpose; stands for ``secrets`` and for ``os.urandom``."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = self.stream("secrets")
        self.choice = self._random.choice
        self.token_bytes = self._random.randbytes

    def stream(self, purpose: str) -> random.Random:
        """Numbers that depend on nothing but the seed and the purpose."""
        return random.Random(f"{self._seed} {purpose}")

    def token_urlsafe(self, nbytes: int = 32) -> str:
        """As ``secrets.token_urlsafe``."""
        return urlsafe(self.token_bytes(nbytes))

    def token_hex(self, nbytes: int = 32) -> str:
        """As ``secrets.token_hex``."""
        return self.token_bytes(nbytes).hex()

    def urandom(self, size: int) -> bytes:
        """As ``os.urandom``."""
        return self.token_bytes(size)


def urlsafe(data: bytes) -> str:
    """The bytes in URL-safe characters, without padding."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


class VirtualDatetime(datetime):
    """A ``datetime`` whose ``now`` is that of the world."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        """The world's wall clock."""
        return wall_clock().astimezone(tz)


def wall_clock() -> datetime:
    """What people's clocks say in the world."""
    return EPOCH + timedelta(seconds=trio.current_time())


def _wall_seconds() -> float:
    return wall_clock().timestamp()


def _fresh(module: str, name: str) -> Callable[[Chance], Any]:
    """Another one of what is there, as it was made when its module was loaded."""
    return lambda _: type(getattr(resolve_name(module), name))()


def _remembering(build: Callable[..., Any]) -> Callable[..., Any]:
    """Werkzeug compiles functions for each rule of each app: half of what a world takes. They depend on its path."""

    def remembered(rule: Any, append_unknown: bool = True) -> Any:
        key = (rule.rule, rule.merge_slashes, tuple(rule._trace), append_unknown)
        if rule.defaults:
            return build(rule, append_unknown)
        if key not in _url_builders:
            _url_builders[key] = build(rule, append_unknown)
        return _url_builders[key]

    return remembered


_url_builders: dict[Any, Any] = {}
_compile_url_builder = Rule._compile_builder

_REPLACED: Sequence[tuple[str, str, Callable[[Chance], Any], str]] = (
    ("engine.supervisor", "secrets", lambda chance: chance, "run ids"),
    ("server.shared_log", "secrets", lambda chance: chance, "names of workers"),
    ("server.share_links", "secrets", lambda chance: chance, "the signing key of a server that is given none"),
    ("server.keys", "secrets", lambda chance: chance, "API keys"),
    ("server.api_agents", "secrets", lambda chance: chance, "ids of agents made through the API"),
    ("wsproto.frame_protocol", "os", lambda chance: chance, "masks of WebSocket clients"),
    ("wsproto.utilities", "os", lambda chance: chance, "nonces of WebSocket clients"),
    (
        "providers.failover",
        "Random",
        lambda chance: lambda: chance.stream("failover"),
        "jitter; the registry passes none",
    ),
    ("engine.run", "datetime", lambda _: VirtualDatetime, "``utc_now`` is a default argument everywhere"),
    ("server.errors", "datetime", lambda _: VirtualDatetime, "timestamps of refusals"),
    ("hypercorn.config", "time", lambda _: _wall_seconds, "the Date header"),
    ("server.errors", "_refusals", _fresh("server.errors", "_refusals"), "counts what a process has logged"),
    ("server.availability", "_outage", _fresh("server.availability", "_outage"), "remembers an outage of the process"),
    ("werkzeug.routing.rules.Rule", "_compile_builder", lambda _: _remembering(_compile_url_builder), "takes 15 ms"),
    ("trio._core._run", "_ALLOW_DETERMINISTIC_SCHEDULING", lambda _: True, "sorts what is to run before it shuffles"),
    ("trio._core._run", "_r", lambda chance: chance.stream("scheduling"), "shuffles it"),
)
"""Module or class, name, what to put there, whose chance or time that is. Each name is looked up when it is used."""


@contextmanager
def determined(chance: Chance) -> Iterator[None]:
    """Replace what is left to chance for as long as the block lasts; the garbage collector rests meanwhile.

    What it would find when it likes might run code (async generators, warnings), and at another point each time.
    """
    before = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for place_name, name, make, _ in _REPLACED:
            place = resolve_name(place_name)
            before.append((place, name, getattr(place, name)))
            setattr(place, name, make(chance))
        yield
    finally:
        for place, name, value in reversed(before):
            setattr(place, name, value)
        if collecting:
            gc.enable()


def run(function: Callable[[Chance], Awaitable[T]], seed: int) -> T:
    """What the function gives, run in a world of its own whose time begins at 0.

    Raises:
        StuckError: it would never have ended; what was left of it was cancelled.
        trio.TrioInternalError: from a ``StuckError``: it would not have ended then either.
    """
    chance, time = Chance(seed), _ExactTime()

    async def main() -> T:
        with time.world:
            return await function(chance)
        assert time.stuck is not None, "nobody else cancels it"
        raise time.stuck

    with determined(chance):
        return trio.run(main, clock=time.clock())


def living_tasks() -> int:
    """How many tasks there are in all."""
    count, waiting = 0, [current_root_task()]
    while waiting:
        task = waiting.pop()
        if task is not None:
            count += 1
            waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return count
