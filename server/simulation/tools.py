"""Simulated tools: each behaves as the plan says, well or badly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import trio

from engine.provider import ToolSpec
from engine.tools import Tool, ToolContext, ToolResult

from .plan import ToolManner, ToolPlan
from .vendors import Noter

MUCH_CHARS = 10_000_000

_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"question": {"type": "string"}},
    "required": ["question"],
}

_much: list[str] = []


class ToolCollapse(BaseException):
    """What a tool raises that raises more than exceptions."""


class SimulatedTool:
    """A tool that behaves as planned; one object serves many runs at once."""

    def __init__(self, plan: ToolPlan, trace: Noter) -> None:
        self.plan = plan
        self.spec = ToolSpec(plan.name, f"A simulated tool that {plan.manner}.", _PARAMETERS)
        self._trace = trace

    async def call(self, arguments: str, context: ToolContext) -> ToolResult:
        """Behave as planned."""
        actor = f"tool {self.plan.name}"
        self._trace.note(actor, "called", run=context.run_id, arguments=arguments)
        how = "failed"
        try:
            value = await _MANNERS[self.plan.manner](self.plan, arguments)
            how = "returned"
        except trio.Cancelled:
            how = "cancelled"
            raise
        finally:
            self._trace.note(actor, how, run=context.run_id)
        return ToolResult(value)


_Manner: TypeAlias = Callable[[ToolPlan, str], Awaitable[Any]]


async def _return(plan: ToolPlan, arguments: str) -> Any:
    await trio.lowlevel.checkpoint()
    return {"tool": plan.name, "of": arguments}


async def _be_slow(plan: ToolPlan, arguments: str) -> Any:
    await trio.sleep(plan.seconds)
    return {"tool": plan.name, "of": arguments}


async def _hang(_plan: ToolPlan, _arguments: str) -> Any:
    await trio.sleep_forever()


async def _raise(plan: ToolPlan, _arguments: str) -> Any:
    await trio.lowlevel.checkpoint()
    raise RuntimeError(f"{plan.name} failed")


async def _raise_group(plan: ToolPlan, _arguments: str) -> Any:
    await trio.lowlevel.checkpoint()
    raise ExceptionGroup(f"{plan.name} failed", [RuntimeError("one"), ExceptionGroup("more", [ValueError("two")])])


async def _raise_base(plan: ToolPlan, _arguments: str) -> Any:
    await trio.lowlevel.checkpoint()
    raise ToolCollapse(f"{plan.name} collapsed")


async def _swallow_cancel(plan: ToolPlan, _arguments: str) -> Any:
    try:
        await trio.sleep_forever()
    except trio.Cancelled:  # noqa: ASYNC103 - what no code should do, and some does
        with trio.move_on_after(plan.seconds, shield=True):
            await trio.sleep_forever()
    return "late"  # noqa: ASYNC104


async def _fail_in_cleanup(plan: ToolPlan, _arguments: str) -> Any:
    try:
        await trio.sleep_forever()
    finally:
        raise RuntimeError(f"{plan.name} failed while it was cancelled")  # noqa: ASYNC104


async def _return_much(_plan: ToolPlan, _arguments: str) -> Any:
    await trio.lowlevel.checkpoint()
    if not _much:
        _much.append("much " * (MUCH_CHARS // 5))
    return _much[0]


async def _return_cycle(_plan: ToolPlan, _arguments: str) -> Any:
    await trio.lowlevel.checkpoint()
    ring: list[Any] = ["round and round"]
    ring.append({"again": ring})
    return ring


async def _return_nan(_plan: ToolPlan, _arguments: str) -> Any:
    await trio.lowlevel.checkpoint()
    return {"figures": [float("nan"), float("inf"), 1.0]}


_MANNERS: dict[ToolManner, _Manner] = {
    "returns": _return,
    "slow": _be_slow,
    "hangs": _hang,
    "raises": _raise,
    "raises_group": _raise_group,
    "raises_base": _raise_base,
    "swallows_cancel": _swallow_cancel,
    "fails_in_cleanup": _fail_in_cleanup,
    "returns_much": _return_much,
    "returns_cycle": _return_cycle,
    "returns_nan": _return_nan,
}


def simulated_tools(plans: Sequence[ToolPlan], trace: Noter) -> dict[str, Tool]:
    """The world's tools, by name."""
    return {plan.name: SimulatedTool(plan, trace) for plan in plans}
