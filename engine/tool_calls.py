"""The tool calls of one step: side by side, each under its own deadline, each answered whatever the tool does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import trio

from .emitter import encodable, short
from .memory import MemoryRefusedError
from .model_call import CallInProgress
from .provider import Message
from .tools import Tool, ToolContext, ToolError, ToolResult, ToolUse


class Outcome(msgspec.Struct, frozen=True):
    """A bounded result: ``value`` for events (plain JSON values), ``text`` for the model."""

    value: Any
    text: str
    failed: bool


class PendingCall:
    """One tool call under way: a task runs the tool, and whoever waits for its outcome never waits past its deadline.

    The tool's task may outlive the deadline, if the tool does not let itself be cancelled; its call does not.
    """

    def __init__(self, call: CallInProgress, tool: Tool | None, refusal: str, seconds: float, max_bytes: int) -> None:
        self.call = call
        self.outcome: Outcome | None = None
        self.task_ended = trio.Event()
        self._tool = tool
        self._refusal = refusal
        self._seconds = seconds
        self._deadline = trio.current_time() + seconds
        self._max_bytes = max_bytes
        self._settled = trio.Event()

    async def execute(self, context: ToolContext, on_settled: Callable[[PendingCall], None]) -> None:
        """Run the tool. Raises nothing but what cancels the task itself."""
        try:
            self._settle(await self._call_tool(context), on_settled)
        finally:
            self.task_ended.set()

    async def wait(self, on_settled: Callable[[PendingCall], None]) -> Outcome:
        """The outcome, at the deadline at the latest."""
        with trio.CancelScope(deadline=self._deadline):
            await self._settled.wait()
        self._settle(self._timed_out(), on_settled)
        assert self.outcome is not None
        return self.outcome

    def as_message(self) -> Message:
        """The result as the model is sent it."""
        assert self.outcome is not None
        return Message("tool", self.outcome.text, tool_call_id=self.call.model_id, tool_failed=self.outcome.failed)

    async def _call_tool(self, context: ToolContext) -> ToolResult:
        if self._tool is None:
            return ToolResult(self._refusal, failed=True)
        result = self._timed_out()
        try:
            with trio.CancelScope(deadline=self._deadline):
                result = await self._tool.call(self.call.arguments, context)
        except* Exception as failure:  # noqa: BLE001 - a tool's failure, whatever it is, is an answer to the model
            result = ToolResult(describe(failure), failed=True)
        return result

    def _timed_out(self) -> ToolResult:
        return ToolResult(f"timed out after {self._seconds:g} s", failed=True)

    def _settle(self, result: ToolResult, on_settled: Callable[[PendingCall], None]) -> None:
        if self.outcome is None:
            self.outcome = bounded(result, self._max_bytes)
            self._settled.set()
            on_settled(self)


def pend(calls: Sequence[CallInProgress], use: ToolUse, allowed: int, seconds: float) -> list[PendingCall]:
    """The calls, ready to be executed: those beyond the ``allowed`` first, and of unknown tools, to be refused."""
    tools = {tool.spec.name: tool for tool in use.tools}
    pending = []
    for number, call in enumerate(calls):
        tool, refusal = tools.get(call.name), ""
        if number >= allowed:
            tool, refusal = None, f"not called: no tool calls are left ({use.max_tool_calls} in one answer)"
        elif tool is None:
            refusal = f"there is no tool {call.name[:100]!r}; there are: {', '.join(tools)}"
        pending.append(PendingCall(call, tool, refusal, seconds, use.max_result_bytes))
    return pending


def describe(failure: BaseException) -> str:
    """What the model is told of an exception: the text alone where it is meant for it, else the kind and the text."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(failure, ToolError | MemoryRefusedError):
        return short(str(failure))
    return short(f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__)


def bounded(result: ToolResult, max_bytes: int) -> Outcome:
    """The result as plain values and as text, cut to so many bytes."""
    value = encodable(result.value) if isinstance(result.value, str) else result.value
    try:
        encoded = value.encode() if isinstance(value, str) else msgspec.json.encode(value)
        value = value if isinstance(value, str) else msgspec.json.decode(encoded)
    except Exception as failure:  # noqa: BLE001 - a value of the tool's own classes can fail in any way
        return Outcome(text := f"the result is no JSON: {describe(failure)}"[:max_bytes], text, failed=True)
    if len(encoded) > max_bytes:
        kept = encoded[:max_bytes].decode("utf-8", "ignore")
        value = f"{kept}\n[cut: the result has {len(encoded)} bytes, {max_bytes} are shown]"
        return Outcome(value, value, result.failed)
    return Outcome(value, encoded.decode(), result.failed)
