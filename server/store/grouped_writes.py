"""Changes that wait for a database's one writer: a thread makes all that wait, in one transaction.

A transaction and a worker thread cost more than most changes. A thousand starts at once are some twenty transactions
this way, and no start waits for the commits of all that came before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import outcome
import trio
from sqlalchemy import Connection

MOST_AT_ONCE = 64
"""Changes in one transaction: who comes next waits for it."""

T = TypeVar("T")
Change: TypeAlias = Callable[[Connection], Any]
Outcome: TypeAlias = outcome.Outcome[Any]
_Group: TypeAlias = Sequence[tuple[trio.lowlevel.Task, Change]]
MakeTogether: TypeAlias = Callable[[Sequence[Change]], Sequence[Outcome]]
"""Makes the changes, in a worker thread; what became of each, in order."""


class GroupedWrites:
    """Makes changes, one group at a time.

    The thread is one of trio's cache, asked for without ``trio.to_thread``, which takes 25 µs and one more scheduler
    pass. It belongs to the tasks whose changes it makes: none of them goes on before it is done.
    """

    def __init__(self, make_together: MakeTogether) -> None:
        self._make_together = make_together
        self._waiting: OrderedDict[trio.lowlevel.Task, Change] = OrderedDict()
        self._under_way = False

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Make the change; what it returns, or raises. Cancelled before it has begun, does nothing; then goes on."""
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        if self._under_way:
            self._waiting[task] = change
        else:
            self._begin([(task, change)])

        def abort(_: Any) -> trio.lowlevel.Abort:
            begun = self._waiting.pop(task, None) is None
            return trio.lowlevel.Abort.FAILED if begun else trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)  # type: ignore[no-any-return]

    def _begin(self, group: _Group) -> None:
        """Have a thread make these changes."""
        token, changes = trio.lowlevel.current_trio_token(), [change for _, change in group]
        trio.lowlevel.start_thread_soon(
            partial(self._make_together, changes), lambda made: token.run_sync_soon(self._made, group, made)
        )
        self._under_way = True

    def _made(self, group: _Group, made: outcome.Outcome[Sequence[Outcome]]) -> None:
        """The thread has done: its tasks go on, and the next ones' changes begin."""
        self._under_way = False
        became = made.value if isinstance(made, outcome.Value) else [made] * len(group)  # an error is a bug
        for (task, _), one in zip(group, became, strict=True):
            trio.lowlevel.reschedule(task, one)
        if self._waiting:
            following = [self._waiting.popitem(last=False) for _ in range(min(len(self._waiting), MOST_AT_ONCE))]
            try:
                self._begin(following)
            except RuntimeError as error:  # no thread is to be had
                self._made(following, outcome.Error(error))
