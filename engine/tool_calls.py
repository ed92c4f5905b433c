"""One tool call of a step: under its own deadline, answered whatever the tool does, its result bounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import trio

from .emitter import encodable, nests_too_deep
from .events import CalledTool, CallOutcome
from .guests import describe, tamed
from .model_call import CallInProgress
from .provider import Message
from .tools import Tool, ToolContext, ToolResult


class BoundedResult(msgspec.Struct, frozen=True):
    """A result that fits: ``value`` for events (plain JSON values), ``text`` for the model."""

    value: Any
    text: str
    failed: bool


class PendingCall:
    """A tool call from the model's asking to its result; whoever waits for that never waits past the deadline.

    The tool's task may outlive the deadline, if the tool does not let itself be cancelled; its call does not.

    Args:
        seconds: what the call may take, from now.
        max_bytes: of the result.
        on_settled: called once, with the call, when it has its result.
    """

    def __init__(
        self,
        call: CallInProgress,
        seconds: float,
        max_bytes: int,
        on_settled: Callable[[PendingCall], None],
    ) -> None:
        self.call = call
        self.result: BoundedResult | None = None
        self._seconds = seconds
        self._deadline = trio.current_time() + seconds
        self._max_bytes = max_bytes
        self._on_settled = on_settled
        self._settled = trio.Event()

    async def execute(self, tool: Tool, context: ToolContext) -> None:
        """Run the tool. Raises nothing but what cancels the task itself."""
        result = timed_out = self._timed_out()
        with trio.CancelScope(deadline=self._deadline) as scope:
            result = await _result_of(tool, self.call.arguments, context)
        # What a tool makes of its cancellation is no result, so that a deadline is told of alike each time.
        self.settle(timed_out if scope.cancel_called else result)

    async def wait(self) -> None:
        """Until there is a result: at the deadline at the latest."""
        with trio.CancelScope(deadline=self._deadline):
            await self._settled.wait()
        self.settle(self._timed_out())

    def refuse(self, reason: str) -> None:
        """Answer the call without calling the tool."""
        self.settle(ToolResult(reason, failed=True))

    def settle(self, result: ToolResult) -> None:
        """This is the result, if there is none yet."""
        if self.result is None:
            self.result = bounded(result, self._max_bytes)
            self._settled.set()
            self._on_settled(self)

    def as_called(self) -> CalledTool:
        """The call as its step tells of it."""
        return CalledTool(self.call.call_id, self.call.name, self.call.arguments_value)

    def as_outcome(self) -> CallOutcome:
        """The result as events tell of it."""
        assert self.result is not None
        return CallOutcome(self.call.call_id, "Error" if self.result.failed else "Success", self.result.value)

    def as_message(self) -> Message:
        """The result as the model is sent it."""
        assert self.result is not None
        return Message("tool", self.result.text, tool_call_id=self.call.model_id, tool_failed=self.result.failed)

    def _timed_out(self) -> ToolResult:
        return ToolResult(f"timed out after {self._seconds:g} s", failed=True)


async def _result_of(tool: Tool, arguments: str, context: ToolContext) -> ToolResult:
    """A failure, whatever it is, is an answer to the model."""
    try:
        result: object = await tamed(partial(tool.call, arguments, context))
    except Exception as failure:  # noqa: BLE001 - see above
        return ToolResult(describe(failure), failed=True)
    if not isinstance(result, ToolResult):  # tools are code of others
        return ToolResult(f"the tool is broken: it gave no ToolResult but {type(result).__name__}", failed=True)
    return result


def bounded(result: ToolResult, max_bytes: int) -> BoundedResult:
    """The result as plain values and as text, cut to so many bytes."""
    value = result.value
    try:
        encoded = encodable(value).encode() if isinstance(value, str) else msgspec.json.encode(value)
        if not isinstance(value, str) and len(encoded) <= max_bytes and not nests_too_deep(encoded):
            return BoundedResult(msgspec.json.decode(encoded), encoded.decode(), result.failed)
    except Exception as failure:  # noqa: BLE001 - a value of the tool's own classes can fail in any way
        return _as_text(f"the result is no JSON: {describe(failure)}".encode(), max_bytes, failed=True)
    return _as_text(encoded, max_bytes, failed=result.failed)


def _as_text(encoded: bytes, max_bytes: int, *, failed: bool) -> BoundedResult:
    text = encoded[:max_bytes].decode("utf-8", "ignore")
    if len(encoded) > max_bytes:
        text += f"\n[cut: the result has {len(encoded)} bytes, {max_bytes} are shown]"
    return BoundedResult(text, text, failed)
