"""The agent's loop: ask the model, do what it calls for, ask again, until it answers or may not call any more."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import Protocol

import msgspec
import trio

from .emitter import Emitter
from .errors import OutputLimitError, ProviderError
from .events import Event, MemoryUpdate, Metadata, StepComplete, ToolCallComplete, Usage
from .guests import Guests
from .memory_news import MemoryNews
from .model_call import CallInProgress, CallOwner, ModelCall, UniqueIds
from .prompt import read_context, with_context
from .provider import Message, ModelRequest
from .spec import RunSpec
from .tool_calls import PendingCall
from .tools import MemoryOperation, ToolContext
from .trace import CANCELLED, Span, Tracer, error_name
from .usage import add_usage


class LoopOwner(CallOwner, Protocol):
    """The run that the loop works for."""

    id: str
    spec: RunSpec
    memory_updates: int


class AgentLoop:
    """The steps of one run: model calls, and between them tool calls, all told of through the emitter.

    Attributes:
        steps: model calls begun.
        turn: the messages that the finished steps added to the conversation.
    """

    def __init__(self, run: LoopOwner, emitter: Emitter, tracer: Tracer) -> None:
        self.steps = 0
        self.turn: list[Message] = []
        self._run = run
        self._spec = run.spec
        self._emitter = emitter
        self._tracer = tracer
        self._tools = {tool.spec.name: tool for tool in run.spec.tool_use.tools}
        self._call: ModelCall | None = None
        self._call_is_kept = False
        self._spent: Usage | None = None
        self._tool_calls = 0
        self._call_ids = UniqueIds()
        self._memory_news: MemoryNews | None = None  # with the first tool

    @property
    def usage(self) -> Usage | None:
        """Token counts of all model calls so far: the vendor's, else an estimate; None before it was asked."""
        call = self._call
        if call is None or (of_call := call.usage) is None:
            return self._spent
        usage = add_usage(self._spent, of_call)
        if call.answered_by is None:
            return usage
        return msgspec.structs.replace(usage, provider=call.answered_by.provider, model=call.answered_by.model)

    @property
    def lateness(self) -> ProviderError | None:
        """Why the model call under way is too late; None if it is not, or if there is none."""
        return None if self._call is None or self._call_is_kept else self._call.lateness

    @property
    def input_tokens(self) -> int | None:
        """The input of ``usage``, without reckoning the rest of it."""
        before = None if self._spent is None else self._spent.input_tokens
        of_call = None if self._call is None else self._call.input_tokens
        return before if of_call is None else (before or 0) + of_call

    def said(self) -> tuple[Message, ...]:
        """What the run adds to the conversation: the finished steps, and the text of one that broke off."""
        if self._call is None or self._call_is_kept or not self._call.text:
            return tuple(self.turn)
        return (*self.turn, Message("assistant", self._call.text))

    async def answer(self, guests: Guests, span: Span) -> ModelCall | None:
        """Go on until there is an answer: the model call that gave it. None if the run was ended meanwhile.

        Steps and tool calls that run out give what answer there is, or end the run with ``max_steps``. A model that
        was offered tools and neither calls any more nor has said anything has answered nothing: ``upstream.protocol``.
        """
        first = request = await self._first_request(guests, span)
        while True:
            may_call = self._may_call_tools()
            with self._tracer.span("step", f"step-{self.steps + 1}", span) as step:
                call = await self._ask(request, step, may_call=may_call)
                if call is None:
                    return None
                calls = call.calls
                results = await self._call_tools(call, guests, step, may_call=may_call) if calls else []
            self._keep(call, results)
            if not (calls and may_call) or call.finish_reason == "content_filter" or self._emitter.log.ended:
                break
            request = msgspec.structs.replace(first, messages=(*first.messages, *self.turn))
        if request.tools and call.finish_reason != "content_filter" and not self._emitter.response.strip():
            self._fail_without_answer(call, ran_out=not may_call)
        elif not calls:
            self._tell_final(call)
        return None if self._emitter.log.ended else call

    def _tell_final(self, call: ModelCall) -> None:
        """The answer is whole. Readers take it as it is, where the end is yet to come."""
        log = self._emitter.log
        log.hold()
        try:
            self._emit(StepComplete("Final", call.step_id))
        finally:
            log.release(more_follows=self._run.ends_at_once)

    def _fail_without_answer(self, call: ModelCall, *, ran_out: bool) -> None:
        use = self._spec.tool_use
        if not ran_out:
            reason = f" (finish reason: {call.finish_reason})" if call.finish_reason else ""
            self._run.fail("upstream.protocol", f"the model gave an empty answer{reason}")
        elif self.steps >= use.max_steps:
            self._run.fail("max_steps", f"the model gave no answer within {use.max_steps} steps (max_steps)")
        else:
            limit = f"{use.max_tool_calls} tool calls (max_tool_calls)"
            self._run.fail("max_steps", f"the model gave no answer after its {limit} were used up")

    def _keep(self, call: ModelCall, results: list[Message]) -> None:
        message = call.as_message(self._spec.provider.name)
        if message.tool_calls or message.content:
            self.turn += (message, *results)
        self._call_is_kept = True

    async def _first_request(self, guests: Guests, span: Span) -> ModelRequest:
        spec = self._spec
        tools = tuple(tool.spec for tool in self._tools.values())
        request = msgspec.structs.replace(spec.request, tools=tools, deadlines=spec.deadlines)
        if spec.memory_use is None:
            return request
        context = await read_context(spec.memory_use, request, guests, self._tracer, span)
        if context.missed and spec.streaming.emit_metadata:
            self._emit(Metadata("memory_missed", context.missed))
        return with_context(request, context)

    def _may_call_tools(self) -> bool:
        """Whether the next step may call tools: the last one that there may be has to answer."""
        use = self._spec.tool_use
        return bool(use.tools) and self.steps + 1 < use.max_steps and self._tool_calls < use.max_tool_calls

    async def _ask(self, request: ModelRequest, parent: Span, *, may_call: bool) -> ModelCall | None:
        """One model call; None if the run was ended by it. Only bugs go on as exceptions."""
        call = self._begin_call(request, may_call=may_call)
        provider, model = self._spec.provider, request.model
        span = self._tracer.begin("model", model, parent, provider=provider.name, model=model)
        failure: BaseException | None = None
        try:
            await call.ask(provider)
        except ProviderError as error:
            failure = error
            self._run.fail(error.code, str(error), error.retry_after)
        except BaseException as reason:
            failure = (isinstance(reason, trio.Cancelled) and call.lateness) or reason
            raise
        finally:
            if self._spec.trace is not None:
                self._tracer.end(span, None if failure is None else error_name(failure), **call.facts())
                if isinstance(failure, ProviderError):
                    self._tracer.end(parent)  # which did not fail itself
        return None if self._emitter.log.ended else call

    def _begin_call(self, request: ModelRequest, *, may_call: bool) -> ModelCall:
        if request.tools and not may_call:
            request = msgspec.structs.replace(request, tool_choice="none")
        self._spent, self.steps = self.usage, self.steps + 1
        self._call_is_kept = False
        self._call = ModelCall(f"step-{self.steps}", request, self._run, self._emitter, self._call_ids, self._spent)
        return self._call

    async def _call_tools(self, call: ModelCall, guests: Guests, parent: Span, *, may_call: bool) -> list[Message]:
        """The step's tool calls, side by side; their results in the order of the calls."""
        self._run.expect_by(inf)
        spans = [self._tracer.begin("tool", one.name, parent, call_id=one.call_id) for one in call.calls]
        pending = [self._pend(one, call.step_id, span) for one, span in zip(call.calls, spans, strict=True)]
        try:
            self._start(pending, guests, filtered=call.finish_reason == "content_filter", may_call=may_call)
            for one in pending:
                await one.wait()
        finally:
            for span in spans:
                self._tracer.end(span, CANCELLED)  # if it has not ended with its result
        called, outcomes = tuple(one.as_called() for one in pending), tuple(one.as_outcome() for one in pending)
        self._emit(StepComplete("Initial" if self.steps == 1 else "Tool", call.step_id, called, outcomes))
        return [one.as_message() for one in pending]

    def _pend(self, call: CallInProgress, step_id: str, span: Span) -> PendingCall:
        def on_settled(pending: PendingCall) -> None:
            outcome = pending.as_outcome()
            self._tracer.end(span, "failed" if outcome.status == "Error" else None)
            self._emit(ToolCallComplete(outcome.call_id, outcome.status, outcome.result, step_id))

        return PendingCall(call, self._spec.deadlines.tool, self._spec.tool_use.max_result_bytes, on_settled)

    def _start(self, pending: list[PendingCall], guests: Guests, *, filtered: bool, may_call: bool) -> None:
        """Start the tools, each in a task; calls that may not be made have their answer at once."""
        allowed = self._spec.tool_use.max_tool_calls - self._tool_calls if may_call else 0
        self._tool_calls += len(pending)
        for number, one in enumerate(pending):
            name = one.call.name
            tool = self._tools.get(name)
            if filtered:
                one.refuse("not called: the answer was filtered")
            elif number >= allowed:
                one.refuse("not called: no more tools may be called for this answer")
            elif tool is None:
                one.refuse(f"there is no tool {name[:100]!r}; there are: {', '.join(self._tools)}")
            else:
                guests.invite(f"tool {name}", partial(one.execute, tool, self._context_for(one.call)))

    def _context_for(self, call: CallInProgress) -> ToolContext:
        memory_use = self._spec.memory_use
        self._memory_news = self._memory_news or MemoryNews(self._note_memory_update)
        return ToolContext(
            run_id=self._run.id,
            call_id=call.call_id,
            agent_id=self._spec.agent_id,
            owner=self._spec.owner,
            memory=memory_use.memory if memory_use else None,
            memory_updated=self._memory_news.pass_on,
        )

    def _note_memory_update(self, key: str, operation: MemoryOperation) -> None:
        if self._emitter.log.ended:  # a tool that was given up on
            return
        self._run.memory_updates += 1
        if self._spec.streaming.emit_memory_updates:
            self._emit(MemoryUpdate(key, operation))

    def _emit(self, event: Event) -> None:
        try:
            self._emitter.emit(event)
        except OutputLimitError as error:
            self._run.fail("output_limit", str(error))
