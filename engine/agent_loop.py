"""The agent's loop: ask the model, do what it calls for, ask again, until it answers or may not call any more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec
import trio

from .emitter import Emitter
from .errors import ErrorCode, OutputLimitError, ProviderError
from .events import (
    CallOutcome,
    CallStatus,
    Event,
    MemoryUpdate,
    Metadata,
    StepComplete,
    ToolCallComplete,
    Usage,
)
from .model_call import ModelCall
from .prompt import read_context, with_context
from .provider import Message, ModelRequest
from .spec import RunSpec
from .tool_calls import PendingCall, pend
from .tools import MemoryOperation, ToolContext
from .trace import Span, Tracer
from .usage import add_usage


class LoopOwner(Protocol):
    """The run that the loop works for."""

    id: str
    spec: RunSpec
    memory_updates: int

    def fail(self, code: ErrorCode, content: str, retry_after: float | None = None) -> bool:
        """End the run, and with it the loop."""
        ...

    def note_content(self) -> None:
        """The model said something."""
        ...


class AgentLoop:
    """The steps of one run: model calls, and between them tool calls, all told of through the emitter.

    Attributes:
        steps: model calls begun.
        pending: tool calls whose tasks may still be there.
        turn: the messages that the finished steps added to the conversation.
    """

    def __init__(self, run: LoopOwner, emitter: Emitter, tracer: Tracer) -> None:
        self.steps = 0
        self.pending: list[PendingCall] = []
        self.turn: list[Message] = []
        self._run = run
        self._spec = run.spec
        self._emitter = emitter
        self._tracer = tracer
        self._call: ModelCall | None = None
        self._call_is_kept = False
        self._spent: Usage | None = None
        self._tool_calls = 0
        self._call_ids: set[str] = set()
        self._asked: tuple[Message, ...] = ()

    @property
    def usage(self) -> Usage | None:
        """Token counts of all model calls so far: the vendor's, else an estimate; None before anything was said."""
        if self._call is None:
            return None
        usage = add_usage(self._spent, self._call.usage)
        answered_by = self._call.answered_by
        if usage is None or answered_by is None:
            return usage
        return msgspec.structs.replace(usage, provider=answered_by.provider, model=answered_by.model)

    def said(self) -> tuple[Message, ...]:
        """What the run adds to the conversation: the finished steps, and the text of one that broke off."""
        if self._call is None or self._call_is_kept or not self._call.text:
            return tuple(self.turn)
        return (*self.turn, Message("assistant", self._call.text))

    async def answer(self, nursery: trio.Nursery, span: Span) -> ModelCall | None:
        """Go on until there is an answer: the model call that gave it. None if the run was ended meanwhile.

        Tool calls run in the nursery. Steps and tool calls that run out give what answer there is, or end the run
        with ``max_steps``.
        """
        request = await self._first_request(span)
        while True:
            may_call = self._may_call_tools()
            with self._tracer.span("step", f"step-{self.steps + 1}", span) as step:
                call = await self._ask(request, step, may_call=may_call)
                if call is None:
                    return None
                refused = not may_call or call.finish_reason == "content_filter"
                results = await self._call_tools(call, nursery, step, refused=refused) if call.calls else []
            self._keep(call, results)
            if refused or not call.calls:
                break
            request = msgspec.structs.replace(request, messages=(*self._asked, *self.turn))
        if request.tools and not may_call and not self._emitter.response.strip():
            self._run.fail("max_steps", f"the model gave no answer within {self.steps} steps")
            return None
        if not call.calls:
            self._emit(StepComplete("Final", call.step_id))
        return None if self._emitter.ended else call

    def _keep(self, call: ModelCall, results: list[Message]) -> None:
        self.turn += (call.as_message(self._spec.provider.name), *results)
        self._call_is_kept = True

    async def _first_request(self, span: Span) -> ModelRequest:
        spec = self._spec
        tools = tuple(tool.spec for tool in spec.tool_use.tools)
        request = msgspec.structs.replace(spec.request, tools=tools, deadlines=spec.deadlines)
        if spec.memory_use is not None:
            context = await read_context(spec.memory_use, request, self._run.id, self._tracer, span)
            if context.missed and spec.streaming.emit_metadata:
                self._emit(Metadata("memory_missed", sorted(context.missed)))
            request = with_context(request, context)
        self._asked = request.messages
        return request

    def _may_call_tools(self) -> bool:
        """Whether the next step may call tools: the last one that there may be has to answer."""
        use = self._spec.tool_use
        return bool(use.tools) and self.steps + 1 < use.max_steps and self._tool_calls < use.max_tool_calls

    async def _ask(self, request: ModelRequest, parent: Span, *, may_call: bool) -> ModelCall | None:
        """One model call; None if the run was ended by it. Only bugs go on as exceptions."""
        if request.tools and not may_call:
            request = msgspec.structs.replace(request, tool_choice="none")
        self._spent, self.steps = self.usage, self.steps + 1
        call = self._call = ModelCall(
            f"step-{self.steps}",
            request,
            self._emitter,
            on_content=self._run.note_content,
            fail=self._run.fail,
            used_ids=self._call_ids,
            spent=self._spent,
        )
        self._call_is_kept = False
        provider = self._spec.provider
        try:
            with self._tracer.span("model", request.model, parent, provider=provider.name, model=request.model) as span:
                try:
                    await call.ask(provider)
                finally:
                    self._tracer.note(span, **call.facts())
        except ProviderError as error:
            self._run.fail(error.code, str(error), error.retry_after)
        return None if self._emitter.ended else call

    async def _call_tools(
        self, call: ModelCall, nursery: trio.Nursery, parent: Span, *, refused: bool
    ) -> list[Message]:
        """The step's tool calls, side by side; their results in the order of the calls."""
        use = self._spec.tool_use
        allowed = 0 if refused else use.max_tool_calls - self._tool_calls
        pending = pend(call.calls, use, allowed, self._spec.deadlines.tool)
        self._tool_calls += len(pending)
        self.pending = [before for before in self.pending if not before.task_ended.is_set()] + pending
        on_settled = partial(self._note_outcome, call.step_id)
        for one in pending:
            nursery.start_soon(self._run_tool, one, on_settled, parent, name=f"tool {one.call.name}")
        for one in pending:
            await one.wait(on_settled)
        called = tuple(one.call.as_called() for one in pending)
        outcomes = tuple(_call_outcome(one) for one in pending)
        self._emit(StepComplete("Initial" if self.steps == 1 else "Tool", call.step_id, called, outcomes))
        return [one.as_message() for one in pending]

    async def _run_tool(self, pending: PendingCall, on_settled: Callable[[PendingCall], None], parent: Span) -> None:
        call, memory_use = pending.call, self._spec.memory_use
        context = ToolContext(
            run_id=self._run.id,
            call_id=call.call_id,
            agent_id=self._spec.agent_id,
            owner=self._spec.owner,
            memory=memory_use.memory if memory_use else None,
            memory_updated=self._note_memory_update,
        )
        span = self._tracer.begin("tool", call.name, parent, call_id=call.call_id)
        try:
            await pending.execute(context, on_settled)
        finally:
            failed = pending.outcome is None or pending.outcome.failed
            self._tracer.end(span, "failed" if failed else None)

    def _note_outcome(self, step_id: str, pending: PendingCall) -> None:
        outcome = _call_outcome(pending)
        self._emit(ToolCallComplete(outcome.call_id, outcome.status, outcome.result, step_id))

    def _note_memory_update(self, key: str, operation: MemoryOperation) -> None:
        self._run.memory_updates += 1
        if self._spec.streaming.emit_memory_updates:
            self._emit(MemoryUpdate(key, operation))

    def _emit(self, event: Event) -> None:
        try:
            self._emitter.emit(event)
        except OutputLimitError as error:
            self._run.fail("output_limit", str(error))


def _call_outcome(pending: PendingCall) -> CallOutcome:
    assert pending.outcome is not None
    status: CallStatus = "Error" if pending.outcome.failed else "Success"
    return CallOutcome(pending.call.call_id, status, pending.outcome.value)
