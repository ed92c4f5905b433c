"""The run's deadlines: how long each wait may take, and what watches an attempt's progress."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Annotated, Literal, TypeAlias

import msgspec
import trio
from msgspec import Meta

from .errors import TimeoutCode

Phase: TypeAlias = Literal["connect", "first_token", "idle", "attempts"]

SLACK_SECONDS = 0.25
"""How late a deadline may be that has been moved a moment ago: to move a scope's takes a tenth of what a token does."""

Seconds: TypeAlias = Annotated[float, Meta(gt=0)]


class Deadlines(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds that a run may take, as a whole and in each of its waits; all above zero.

    Attributes:
        total: the whole run.
        connect: opening the upstream connection and writing the request.
        first_token: from the request sent to the first content piece.
        idle: between two content pieces; keep-alives and empty deltas do not count. After pieces that came quickly it
            may end a hundredth of it later, ``SLACK_SECONDS`` at most.
        tool: each tool call.
    """

    total: Seconds = 120.0
    connect: Seconds = 10.0
    first_token: Seconds = 30.0
    idle: Seconds = 30.0
    tool: Seconds = 30.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"deadline {name} must be a number of seconds above 0")

    def shortened(self, wish: DeadlineWish) -> Deadlines:
        """These deadlines with what the wish shortens.

        Raises:
            DeadlineTooLongError: the wish asks for more than these allow.
        """
        wished = {name: value for name in wish.__struct_fields__ if (value := getattr(wish, name)) is not None}
        for name, value in wished.items():
            if value > getattr(self, name):
                raise DeadlineTooLongError(name, value, getattr(self, name))
        return msgspec.structs.replace(self, **wished)


class DeadlineWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request asks for: seconds, as in ``Deadlines``; None leaves the server's."""

    total: Seconds | None = None
    connect: Seconds | None = None
    first_token: Seconds | None = None
    idle: Seconds | None = None
    tool: Seconds | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ValueError(f"deadline {name} must be a number of seconds above 0")


class DeadlineTooLongError(ValueError):
    """A request asked for a longer deadline than the server allows."""

    def __init__(self, name: str, wished: float, allowed: float) -> None:
        super().__init__(f"deadline {name} is {wished:g} s; at most {allowed:g} s is allowed")
        self.name = name
        self.allowed = allowed


class Phases:
    """The phases of one attempt: its deadline moves as the phase changes, and the phase names the code.

    Args:
        move: moves the deadline, on trio's clock.

    Attributes:
        limit: the current phase's seconds; infinite while a provider keeps the deadlines of its attempts itself.
        due_at: the deadline.
    """

    __slots__ = ("_deadlines", "_move", "_moved_at", "due_at", "limit", "phase")

    def __init__(self, deadlines: Deadlines, move: Callable[[float], None]) -> None:
        self._deadlines = deadlines
        self._move = move
        self.phase: Phase = "connect"
        self.limit = deadlines.connect
        self.due_at = trio.current_time() + deadlines.connect
        self._moved_at = -inf
        move(self.due_at)

    def enter(self, phase: Phase, now: float | None = None) -> None:
        """Begin the phase, or begin its wait anew: the deadline is the phase's seconds from now.

        A wait that began a moment ago gets some slack, and what begins it anew within that moves nothing.
        Does nothing once the deadline has passed: the phase that it ended gives the error its name.
        """
        now = trio.current_time() if now is None else now
        if now >= self.due_at:
            return
        slack = 0.0
        if phase != self.phase:
            self.phase = phase
            self.limit = getattr(self._deadlines, phase, inf)
        elif now + self.limit <= self.due_at:
            return
        elif now < self._moved_at + 2 * SLACK_SECONDS:
            slack = min(SLACK_SECONDS, self.limit / 100)
        self._moved_at = now
        self.due_at = now + self.limit + slack
        self._move(self.due_at)

    @property
    def missed(self) -> bool:
        """Whether the deadline has passed."""
        return trio.current_time() >= self.due_at

    @property
    def error_code(self) -> TimeoutCode:
        """The code of the deadline that is armed now."""
        return PHASE_CODES[self.phase]


class Progress(Phases):
    """The phases of an attempt under a scope of its own.

    Use as ``with progress.scope: …`` and test ``progress.scope.cancelled_caught`` outside.
    """

    __slots__ = ("scope",)

    def __init__(self, deadlines: Deadlines) -> None:
        self.scope = trio.CancelScope()
        super().__init__(deadlines, self._set_deadline)

    @property
    def missed(self) -> bool:
        """Whether the deadline has passed, or the attempt was cancelled by another's hand."""
        return self.scope.cancel_called

    def _set_deadline(self, due_at: float) -> None:
        self.scope.deadline = due_at


PHASE_CODES: dict[Phase, TimeoutCode] = {
    "connect": "timeout.connect",
    "first_token": "timeout.first_token",
    "idle": "timeout.idle",
}
