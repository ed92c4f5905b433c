"""Code of others in a run's nursery: tools and memories. The run hosts it, and waits for it no longer than it wants."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from .emitter import short
from .memory import MemoryRefusedError
from .tools import ToolError

T = TypeVar("T")


class GuestError(Exception):
    """Code of others raised what no code may raise here; the text describes it."""


class Guests:
    """The tasks of a run that run code of others.

    Whoever waits for one waits with a limit of its own: a guest that does not let itself be cancelled stays in the
    nursery, and nothing else of the run does.

    Args:
        on_bug: hears of what a guest's own host raised: a bug of ours, that ends the run and nothing else.
        nursery: theirs; None for a run that has none.
    """

    __slots__ = ("_here", "_nursery", "_on_bug", "run_id")

    def __init__(self, run_id: str, on_bug: Callable[[Exception], None], nursery: trio.Nursery | None = None) -> None:
        self.run_id = run_id
        self._nursery = nursery
        self._on_bug = on_bug
        self._here: dict[trio.Event, str] = {}

    @property
    def names(self) -> list[str]:
        """Those that are still there, in the order of their coming."""
        return list(self._here.values())

    def invite(self, name: str, visit: Callable[[], Awaitable[None]]) -> trio.Event:
        """Start a task for it; the event is set when it has gone."""
        assert self._nursery is not None, f"there is no room for {name}"
        gone = trio.Event()
        self._here[gone] = name
        self._nursery.start_soon(self._host, visit, gone, name=name)
        return gone

    def cancel(self) -> None:
        """The run has ended: those that are still there are to go."""
        if self._here and self._nursery is not None:
            self._nursery.cancel_scope.cancel(reason="the run has ended")

    async def wait_gone(self) -> None:
        """Until all have gone."""
        for gone in list(self._here):
            await gone.wait()

    async def _host(self, visit: Callable[[], Awaitable[None]], gone: trio.Event) -> None:
        try:
            await visit()
        except Exception as bug:  # noqa: BLE001 - told of, and the run ends for it
            self._on_bug(bug)
        finally:
            del self._here[gone]
            gone.set()


async def tamed(call: Callable[[], Awaitable[T]]) -> T:
    """Await code of others. ``Cancelled`` comes only from a cancellation of this task.

    A ``Cancelled`` of another task's (two that share one connection, say), alone or in a group, would cancel the run
    and more; a ``SystemExit`` would end the server. Only ``KeyboardInterrupt`` is the user's own, and passes.

    Raises:
        GuestError: for what is no ``Exception``; all others as they are.
    """
    try:
        return await call()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as odd:
        if isinstance(odd, BaseExceptionGroup) and odd.subgroup(KeyboardInterrupt):
            raise
        await trio.lowlevel.checkpoint_if_cancelled()  # noqa: ASYNC102 - being cancelled, that is what goes on
        raise GuestError(describe(odd)) from odd  # noqa: ASYNC104


def describe(failure: BaseException) -> str:
    """What a model is told of an exception: the text alone where it is meant for it, else the kind and the text."""
    while isinstance(failure, BaseExceptionGroup):
        failures = failure.split(trio.Cancelled)[1] or failure
        failure = failures.exceptions[0]
    kind = type(failure).__name__
    try:
        text = short(str(failure))
    except Exception:  # noqa: BLE001 - ``__str__`` is code of others too
        return kind
    if isinstance(failure, ToolError | MemoryRefusedError | GuestError):
        return text
    return short(f"{kind}: {text}") if text else kind
