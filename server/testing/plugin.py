"""The pytest plugin: fixtures ``virtual_lumos``, ``replay`` and ``faults``. Loads nothing else until they are used.

A world is open around the body of the test, not in a fixture: a fixture would yield inside the world's nursery, and a
crash in there would cancel the wrong thing, differently in each plugin. So ``virtual_lumos`` is a plain object that
fixtures of any kind may add agents to, and the test's coroutine is wrapped before pytest-trio or anyio gets to run it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .faults import Faults
    from .lumos import VirtualLumos
    from .replay import Replay

VIRTUAL_DAY_SECONDS = 86_400.0

_STUCK = "a virtual day has passed and the test has not ended: it waits for what will never happen"


@pytest.fixture
def virtual_lumos() -> VirtualLumos:
    """Lumos's real server in memory, on a virtual clock, for an async test of pytest-trio's or anyio's plugin."""
    from .lumos import VirtualLumos  # noqa: PLC0415 - start-up of every test session counts

    return VirtualLumos()


@pytest.fixture
def replay() -> Replay:
    """Makes what a model answers: recordings, or written in place."""
    from .replay import Replay  # noqa: PLC0415 - as above

    return Replay()


@pytest.fixture
def faults() -> Faults:
    """Makes what goes wrong."""
    from .faults import Faults  # noqa: PLC0415 - as above

    return Faults()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Wrap the test's coroutine, before pytest-trio's hook of the same name makes it a synchronous function."""
    if not isinstance(item, pytest.Function) or "virtual_lumos" not in item.fixturenames:
        return (yield)
    body = item.obj
    if not inspect.iscoroutinefunction(body) or hasattr(body, "in_virtual_lumos"):
        return (yield)
    if item.get_closest_marker("trio") is not None:
        item.add_marker(pytest.mark.trio(run=_virtual_run(item)), append=False)
    lumos: Any = item.funcargs["virtual_lumos"]
    item.obj = _in_world(lumos, body)
    try:
        return (yield)
    finally:
        item.obj = body


def _in_world(lumos: VirtualLumos, body: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """The test, with the world open around it, and ended after a virtual day: time jumps, so a deadlock is at once."""

    @functools.wraps(body)
    async def in_world(*args: Any, **kwargs: Any) -> None:
        import trio  # noqa: PLC0415 - as above

        async with lumos:
            with trio.move_on_after(VIRTUAL_DAY_SECONDS) as day:
                await body(*args, **kwargs)
            if day.cancelled_caught:
                pytest.fail(_STUCK, pytrace=False)

    vars(in_world)["in_virtual_lumos"] = True
    return in_world


def _virtual_run(item: pytest.Item) -> Callable[..., Any]:
    """What pytest-trio is to run the test with: what it would have run it with, on a clock that jumps."""
    import trio  # noqa: PLC0415 - as above
    from trio.testing import MockClock  # noqa: PLC0415 - as above

    runs = (marker.kwargs.get("run") for marker in item.iter_markers("trio"))
    run: Callable[..., Any] = next((run for run in runs if run is not None), trio.run)

    def run_virtually(test: Callable[..., Awaitable[Any]], *, clock: Any = None, **options: Any) -> Any:
        return run(test, clock=clock or MockClock(autojump_threshold=0), **options)

    return run_virtually
