"""Changes that wait for a database's one writer: a thread makes all that wait, in one transaction.

A transaction and a worker thread cost more than most changes. A thousand starts at once are some twenty transactions
this way, and no start waits for the commits of all that came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import outcome
import trio
from sqlalchemy import Connection

from providers.readiness import caller_from_threads

from .errors import StoreUnavailableError

MOST_AT_ONCE = 64
"""Changes in one transaction: who comes next waits for it."""

QUEUE_SECONDS = 5.0
"""How long a change waits for those before it: as long as SQLite does for another program's."""

T = TypeVar("T")
Change: TypeAlias = Callable[[Connection], Any]
Outcome: TypeAlias = outcome.Outcome[Any]
MakeTogether: TypeAlias = Callable[[Sequence[Change]], Sequence[Outcome]]
"""Makes the changes, in a worker thread; what became of each, in order. What it raises became of all."""


class _Asked:
    """A change, and the task that waits for it; None if that has given it up."""

    __slots__ = ("change", "task")

    def __init__(self, change: Change) -> None:
        self.change = change
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()


class GroupedWrites:
    """Makes changes, one group at a time.

    The thread is one of trio's cache, asked for without ``trio.to_thread``, which takes 25 µs and one more scheduler
    pass. It belongs to the tasks whose changes it makes: none of them goes on before it is done, but who may give up.
    """

    def __init__(self, make_together: MakeTogether) -> None:
        self._make_together = make_together
        self._waiting: dict[_Asked, None] = {}
        self._under_way = False

    async def write(self, change: Callable[[Connection], T], *, may_give_up: bool = False) -> T:
        """Make the change; what it returns, or raises. Cancelled before it has begun, does nothing; then goes on.

        Who ``may_give_up`` does not wait for it then: it may be made, or fail, all the same.

        Raises:
            StoreUnavailableError: others' changes took too long.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        asked = _Asked(change)

        def abort(_: Any) -> trio.lowlevel.Abort:
            if asked in self._waiting:
                del self._waiting[asked]
            elif may_give_up:
                asked.task = None
            else:
                return trio.lowlevel.Abort.FAILED
            return trio.lowlevel.Abort.SUCCEEDED

        if not self._under_way:  # then there is nothing that could take long before it has begun
            self._begin([asked])
            return await trio.lowlevel.wait_task_rescheduled(abort)  # type: ignore[no-any-return]
        self._waiting[asked] = None
        with trio.move_on_after(QUEUE_SECONDS):
            return await trio.lowlevel.wait_task_rescheduled(abort)  # type: ignore[no-any-return]
        raise StoreUnavailableError(f"the changes before this one take longer than {QUEUE_SECONDS:g} s")

    def _begin(self, group: Sequence[_Asked]) -> None:
        """Have a thread make these changes."""
        call_soon = caller_from_threads()

        def deliver(made: outcome.Outcome[Sequence[Outcome]]) -> None:
            call_soon(partial(self._made, group, made))  # if the loop has ended meanwhile, all have given up

        trio.lowlevel.start_thread_soon(partial(self._make_together, [asked.change for asked in group]), deliver)
        self._under_way = True

    def _made(self, group: Sequence[_Asked], made: outcome.Outcome[Sequence[Outcome]]) -> None:
        """The thread has done: its tasks go on, and the next ones' changes begin."""
        self._under_way = False
        became = made.value if isinstance(made, outcome.Value) else [made] * len(group)
        for asked, one in zip(group, became, strict=True):
            if asked.task is not None:
                trio.lowlevel.reschedule(asked.task, one)
        if self._waiting:
            following = list(islice(self._waiting, MOST_AT_ONCE))
            for asked in following:
                del self._waiting[asked]
            try:
                self._begin(following)
            except RuntimeError as error:  # no thread is to be had
                self._made(following, outcome.Error(error))
