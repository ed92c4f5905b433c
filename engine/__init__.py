"""Lumos's engine: agents, runs, their events and logs. Knows no HTTP, no vendor and no SQL."""

from .agent import BasicAgent, Messages, RunOptions, RunStream, StreamingAgent
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
from .pieces import (
    Emit,
    FinishPiece,
    Piece,
    ReasoningPiece,
    RequestSentPiece,
    TextPiece,
    ToolCallPiece,
    UsagePiece,
)
from .provider import Message, ModelRequest, Provider, ToolCall, ToolSpec
from .run import Run, RunObserver, RunSpec
from .supervisor import DrainingError, RetentionLimits, RunSupervisor

__all__ = [
    "AgentStarted",
    "AgentStopped",
    "BasicAgent",
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
    "MemoryUpdate",
    "Message",
    "Messages",
    "Metadata",
    "ModelRequest",
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
    "StepComplete",
    "StreamingAgent",
    "StreamingConfig",
    "TextDelta",
    "TextPiece",
    "ToolCall",
    "ToolCallComplete",
    "ToolCallDelta",
    "ToolCallPiece",
    "ToolCallStart",
    "ToolSpec",
    "Usage",
    "UsagePiece",
    "UsageUpdate",
]
