"""The public face: an agent that answers whole (``generate``) or as a stream of events (``execute_streaming``)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, TypeAlias

import msgspec
import trio

from .deadlines import Deadlines, DeadlineWish
from .emitter import StreamingConfig
from .errors import RunFailedError, RunStoppedError
from .events import AgentStopped, Error, Event, GenerationComplete
from .memory import MemoryUse, Owner
from .provider import Message, ModelRequest, Provider
from .run import Run
from .spec import MAX_RUN_BYTES, RunSpec
from .supervisor import random_run_id
from .tools import ToolUse
from .trace import TraceCollector

Messages: TypeAlias = str | Message | Iterable[Message]
"""What a caller may hand over: one user message as text, one message, or the conversation in order."""

MemoryFactory: TypeAlias = Callable[[Owner], MemoryUse]
"""Makes what a run remembers of its owner; called for every run."""

DEFAULT_SESSION = "default"

DEFAULT_INSTRUCTIONS = "You are a helpful assistant."


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What one call may set for its run; None leaves the agent's.

    ``deadlines`` can only shorten the agent's. ``extra`` goes to the vendor as it is. Runs of the same ``session_id``
    are one conversation, for an agent that has a memory.
    """

    deadlines: DeadlineWish | None = None
    streaming: StreamingConfig | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    extra: dict[str, Any] = {}
    resume_grace: float = 5.0
    session_id: str = DEFAULT_SESSION
    on_ended: Callable[[Run], None] | None = None


class BasicAgent(msgspec.Struct, frozen=True, kw_only=True):
    """An agent: a model, its instructions and its limits. Holds no connection; the provider's owner closes it.

    Attributes:
        agent_id: the id in events and URLs.
        provider: the model's wire, shared by all runs.
        model: the model's name at that provider.
        instructions: the system prompt; empty sends none.
        tool_use: the tools that it may call, and how often.
        owner: whose agent it is; a run adds its session.
        memories: what it remembers of an owner; None is an agent without memory.
        trace: hears of the spans of its runs.
    """

    agent_id: str
    provider: Provider
    model: str
    instructions: str = DEFAULT_INSTRUCTIONS
    name: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    deadlines: Deadlines = Deadlines()
    streaming: StreamingConfig = StreamingConfig()
    max_run_bytes: int = MAX_RUN_BYTES
    tool_use: ToolUse = ToolUse()
    owner: Owner = Owner()
    memories: MemoryFactory | None = None
    trace: TraceCollector | None = None

    def run_spec(self, messages: Messages, options: RunOptions | None = None) -> RunSpec:
        """The run that answers these messages.

        Raises:
            DeadlineTooLongError: the options ask for more than the agent's deadlines allow.
        """
        options = options or RunOptions()
        deadlines = self.deadlines if options.deadlines is None else self.deadlines.shortened(options.deadlines)
        owner = msgspec.structs.replace(self.owner, session_id=options.session_id)
        return RunSpec(
            agent_id=self.agent_id,
            provider=self.provider,
            request=self._model_request(messages, options),
            deadlines=deadlines,
            streaming=options.streaming or self.streaming,
            resume_grace=options.resume_grace,
            max_run_bytes=self.max_run_bytes,
            tool_use=self.tool_use,
            memory_use=None if self.memories is None else self.memories(owner),
            owner=owner,
            trace=self.trace,
            on_ended=options.on_ended,
        )

    async def generate(self, messages: Messages, options: RunOptions | None = None) -> GenerationComplete:
        """Answer whole: the run's ``done`` event, with the text in ``response``.

        Raises:
            RunFailedError: the run ended in an ``error`` event.
            RunStoppedError: the run was stopped.
            DeadlineTooLongError: the options ask for more than the agent's deadlines allow.
        """
        async with StreamingAgent(self, self.streaming).execute_streaming(messages, options) as events:
            async for event in events:
                match event:
                    case GenerationComplete():
                        return event
                    case Error():
                        raise RunFailedError(event.code, event.content, event.response)
                    case AgentStopped():
                        raise RunStoppedError(event.reason, event.response)
        raise AssertionError("a run's log ended without a terminal event")

    def _model_request(self, messages: Messages, options: RunOptions) -> ModelRequest:
        system = (Message("system", self.instructions),) if self.instructions else ()
        return ModelRequest(
            messages=system + conversation(messages),
            model=self.model,
            temperature=self.temperature if options.temperature is None else options.temperature,
            max_tokens=self.max_tokens if options.max_tokens is None else options.max_tokens,
            extra=options.extra,
        )


def conversation(messages: Messages) -> tuple[Message, ...]:
    """The messages as a conversation: text alone is one user message."""
    if isinstance(messages, str):
        return (Message("user", messages),)
    return (messages,) if isinstance(messages, Message) else tuple(messages)


async def begin_turn(spec: RunSpec, run_id: str) -> None:
    """Let the run's memory keep the user's message, before the run starts. Raises what the memory raises."""
    if spec.memory_use is not None:
        message = next((message for message in reversed(spec.request.messages) if message.role == "user"), None)
        if message is not None:
            await spec.memory_use.memory.begin_turn(run_id, message)


class StreamingAgent:
    """An agent whose runs are watched event by event."""

    def __init__(self, agent: BasicAgent, config: StreamingConfig) -> None:
        self.agent = agent
        self.config = config

    @classmethod
    def with_config(cls, agent: BasicAgent, config: StreamingConfig) -> StreamingAgent:
        """The agent, streamed with this configuration."""
        return cls(agent, config)

    def execute_streaming(self, messages: Messages, options: RunOptions | None = None) -> RunStream:
        """A run of the agent, as ``async with … as events: async for event in events``. Leaving the block ends it.

        Raises:
            DeadlineTooLongError: the options ask for more than the agent's deadlines allow.
        """
        options = options or RunOptions()
        if options.streaming is None:
            options = msgspec.structs.replace(options, streaming=self.config)
        return RunStream(self.agent.run_spec(messages, options))


class RunStream:
    """One run with one reader, in the caller's own task tree. Entering it raises what the agent's memory raises.

    ``async with`` starts the run and gives the iterator of its events, which ends after the terminal event; leaving
    the block stops the run, if it still goes on, and returns once everything it started is gone.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._stack = AsyncExitStack()
        self.run: Run | None = None

    async def __aenter__(self) -> AsyncIterator[Event]:
        run_id = random_run_id()
        await begin_turn(self._spec, run_id)
        self.run = Run(run_id, self._spec)
        nursery = await self._stack.enter_async_context(trio.open_nursery())
        self._stack.callback(self.run.stop, "left")
        self._stack.enter_context(self.run.log.attached())
        nursery.start_soon(self.run.execute, name=f"run {self.run.id}")
        return RunEvents(self.run)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The stack is closed as if without error, so that the nursery does not wrap the caller's own exception.
        try:
            await self._stack.aclose()
        except* trio.Cancelled:  # noqa: ASYNC103 - the exception that left the block goes on, and is not lost for it
            if error is None:
                raise


class RunEvents:
    """Iterates the events of a run's log from the first to the terminal one. Holds nothing that must be closed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._after = 0
        self._ready: list[Event] = []

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if not self._ready:
            entries = await self.run.log.read(self._after)
            if not entries:
                raise StopAsyncIteration
            self._after = entries[-1].seq
            self._ready = [entry.event for entry in reversed(entries)]
        return self._ready.pop()
