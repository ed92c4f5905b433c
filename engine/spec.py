"""What a run is made from: the model, what to ask it, its tools, its memory and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .deadlines import Deadlines
from .emitter import StreamingConfig
from .memory import MemoryUse, Owner
from .provider import ModelRequest, Provider
from .tools import ToolUse
from .trace import TraceCollector

MAX_RUN_BYTES = 8 * 2**20

_NO_TOOLS = ToolUse()


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run needs to know: which model, what to ask it, and the run's limits.

    Attributes:
        request: instructions and messages; tools, memory and deadlines are added by the run.
        tool_use: the tools that the model is offered.
        memory_use: what the model is reminded of, and who keeps what was said; None remembers nothing.
        owner: whose run it is.
        trace: hears of the run's spans.
        on_ended: called once with the ``Run``, when the terminal event is in the log; synchronous, perhaps outside
            of every task (see ``RunObserver``).
        resume_grace: seconds that the run goes on without a reader; 0 = ends at once, ``inf`` = goes on.
        max_run_bytes: bound of the log's frames before the terminal event, which repeats the answer, so that the whole
            log stays within twice this and ``CLOSING_BYTES``; past it the run ends in ``output_limit``.
    """

    agent_id: str
    provider: Provider
    request: ModelRequest
    deadlines: Deadlines = Deadlines()
    streaming: StreamingConfig = StreamingConfig()
    tool_use: ToolUse = ToolUse()
    memory_use: MemoryUse | None = None
    owner: Owner = Owner()
    trace: TraceCollector | None = None
    on_ended: Callable[[Any], None] | None = None
    resume_grace: float = 5.0
    max_run_bytes: int = MAX_RUN_BYTES

    def __post_init__(self) -> None:
        if not self.resume_grace >= 0:
            raise ValueError("resume_grace is a number of seconds, at least 0")

    def emptied(self) -> RunSpec:
        """The spec of an ended run: its names and times, without what only a living one needs."""
        return msgspec.structs.replace(
            self,
            request=ModelRequest((), self.request.model),
            tool_use=_NO_TOOLS,
            memory_use=None,
            trace=None,
            on_ended=None,
        )
