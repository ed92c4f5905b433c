"""Lumos's engine: agents, runs, their events and logs. Knows no HTTP, no vendor and no SQL.

A name is imported when it is first asked for (PEP 562): all of them load trio and msgspec, and take some 120 ms. So
``from engine import TextDelta`` loads msgspec alone, and so does any submodule that needs no more.
"""

from importlib import import_module

TYPE_CHECKING = False  # checkers know the name; typing's own would be most of what an import of this takes

if TYPE_CHECKING:
    from .agent import BasicAgent, Messages, RunOptions, RunStream, StreamingAgent, begin_turn
    from .deadlines import Deadlines, DeadlineTooLongError, DeadlineWish
    from .emitter import StreamingConfig
    from .errors import ErrorCode, ProviderError, RunFailedError, RunStoppedError
    from .events import (
        AgentStarted,
        AgentStopped,
        Error,
        Event,
        GenerationComplete,
        MemoryUpdate,
        Metadata,
        ReasoningDelta,
        StepComplete,
        TextDelta,
        ToolCallComplete,
        ToolCallDelta,
        ToolCallStart,
        Usage,
        UsageUpdate,
    )
    from .log import LogEntry, RunLog
    from .memory import Memory, MemoryEntry, MemoryRefusedError, MemoryUse, Owner, TurnRecord, WorkingMemoryChange
    from .observer import RunObserver
    from .pieces import (
        AnsweredByPiece,
        AttemptsPiece,
        ContinuationPiece,
        Emit,
        FinishPiece,
        Piece,
        ReasoningPiece,
        RequestSentPiece,
        TextPiece,
        ToolCallPiece,
        UsagePiece,
    )
    from .provider import Message, ModelRequest, NamedTool, Provider, ToolCall, ToolChoice, ToolSpec
    from .run import Run
    from .spec import RunSpec
    from .supervisor import DrainingError, RetentionLimits, RunSupervisor
    from .tools import Tool, ToolContext, ToolError, ToolResult, ToolUse
    from .trace import Span, TraceCollector
else:  # hidden from checkers, which would take any name for one that there is

    def __getattr__(name: str) -> object:
        if name in _NAMES:
            return import_module(f".{name}", __name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return value


__all__ = [
    "AgentStarted",
    "AgentStopped",
    "AnsweredByPiece",
    "AttemptsPiece",
    "BasicAgent",
    "ContinuationPiece",
    "DeadlineTooLongError",
    "DeadlineWish",
    "Deadlines",
    "DrainingError",
    "Emit",
    "Error",
    "ErrorCode",
    "Event",
    "FinishPiece",
    "GenerationComplete",
    "LogEntry",
    "Memory",
    "MemoryEntry",
    "MemoryRefusedError",
    "MemoryUpdate",
    "MemoryUse",
    "Message",
    "Messages",
    "Metadata",
    "ModelRequest",
    "NamedTool",
    "Owner",
    "Piece",
    "Provider",
    "ProviderError",
    "ReasoningDelta",
    "ReasoningPiece",
    "RequestSentPiece",
    "RetentionLimits",
    "Run",
    "RunFailedError",
    "RunLog",
    "RunObserver",
    "RunOptions",
    "RunSpec",
    "RunStoppedError",
    "RunStream",
    "RunSupervisor",
    "Span",
    "StepComplete",
    "StreamingAgent",
    "StreamingConfig",
    "TextDelta",
    "TextPiece",
    "Tool",
    "ToolCall",
    "ToolCallComplete",
    "ToolCallDelta",
    "ToolCallPiece",
    "ToolCallStart",
    "ToolChoice",
    "ToolContext",
    "ToolError",
    "ToolResult",
    "ToolSpec",
    "ToolUse",
    "TraceCollector",
    "TurnRecord",
    "Usage",
    "UsagePiece",
    "UsageUpdate",
    "WorkingMemoryChange",
    "begin_turn",
]

_NAMES = {
    "agent": "BasicAgent Messages RunOptions RunStream StreamingAgent begin_turn",
    "deadlines": "Deadlines DeadlineTooLongError DeadlineWish",
    "emitter": "StreamingConfig",
    "errors": "ErrorCode ProviderError RunFailedError RunStoppedError",
    "events": (
        "AgentStarted AgentStopped Error Event GenerationComplete MemoryUpdate Metadata ReasoningDelta StepComplete "
        "TextDelta ToolCallComplete ToolCallDelta ToolCallStart Usage UsageUpdate"
    ),
    "log": "LogEntry RunLog",
    "memory": "Memory MemoryEntry MemoryRefusedError MemoryUse Owner TurnRecord WorkingMemoryChange",
    "observer": "RunObserver",
    "pieces": (
        "AnsweredByPiece AttemptsPiece ContinuationPiece Emit FinishPiece Piece ReasoningPiece RequestSentPiece "
        "TextPiece ToolCallPiece UsagePiece"
    ),
    "provider": "Message ModelRequest NamedTool Provider ToolCall ToolChoice ToolSpec",
    "run": "Run",
    "spec": "RunSpec",
    "supervisor": "DrainingError RetentionLimits RunSupervisor",
    "tools": "Tool ToolContext ToolError ToolResult ToolUse",
    "trace": "Span TraceCollector",
}
"""What each submodule has of ``__all__``."""

_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __dir__() -> list[str]:
    return sorted(__all__)
