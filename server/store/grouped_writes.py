"""Changes that wait for a database's one writer: whoever is next takes all that wait along, in one transaction.

A transaction and a worker thread cost more than most changes. A thousand starts at once are a dozen transactions this
way, and no start waits for the commits of all that came before it. There is no task: one of those who wait does it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import outcome
import trio
from sqlalchemy import Connection

MOST_AT_ONCE = 64
"""Changes in one transaction: who comes next waits for it."""

T = TypeVar("T")
Change: TypeAlias = Callable[[Connection], Any]
Outcome: TypeAlias = outcome.Outcome[Any]
MakeTogether: TypeAlias = Callable[[Sequence[Change]], Sequence[Outcome]]
"""Makes the changes in a worker thread; what became of each, in order."""


class GroupedWrites:
    """Makes changes, one group at a time. ``limiter`` bounds the threads that it and others use."""

    def __init__(self, make_together: MakeTogether, limiter: trio.CapacityLimiter) -> None:
        self._make_together = make_together
        self._limiter = limiter
        self._waiting: OrderedDict[trio.lowlevel.Task, Change] = OrderedDict()
        self._led = False

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Make the change; what it returns, or raises. Cancelled before it has begun, does nothing; then goes on."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._led:
            became: Outcome | None = await self._wait_turn(change)
            if became is not None:
                result: T = became.unwrap()
                return result
        self._led = True
        group: list[tuple[trio.lowlevel.Task | None, Change]] = [(None, change)]
        while self._waiting and len(group) < MOST_AT_ONCE:
            group.append(self._waiting.popitem(last=False))
        return await self._lead(group)  # type: ignore[no-any-return]

    async def _wait_turn(self, change: Change) -> Outcome | None:
        """What became of the change, made by somebody else; None if its own task is the next to make some."""
        task = trio.lowlevel.current_task()
        self._waiting[task] = change

        def abort(_: Any) -> trio.lowlevel.Abort:
            begun = self._waiting.pop(task, None) is None
            return trio.lowlevel.Abort.FAILED if begun else trio.lowlevel.Abort.SUCCEEDED

        became: Outcome | None = await trio.lowlevel.wait_task_rescheduled(abort)
        return became

    async def _lead(self, group: Sequence[tuple[trio.lowlevel.Task | None, Change]]) -> Any:
        """Make the changes of a group, whatever is cancelled meanwhile: it is as long as the database lets it be."""
        became: Sequence[Outcome] = ()
        try:
            with trio.CancelScope(shield=True):
                changes = [change for _, change in group]
                became = await trio.to_thread.run_sync(self._make_together, changes, limiter=self._limiter)
        except BaseException as bug:
            became = [outcome.Error(bug) for _ in group]
            raise
        finally:
            for (task, _), one in zip(group[1:], became[1:], strict=True):
                assert task is not None
                trio.lowlevel.reschedule(task, outcome.Value(one))
            self._hand_over()
        return became[0].unwrap()

    def _hand_over(self) -> None:
        if self._waiting:
            task, _ = self._waiting.popitem(last=False)
            trio.lowlevel.reschedule(task)
        else:
            self._led = False
