"""What is written down of an agent: the record that agents files, the store and the API share."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from engine import Deadlines, StreamingConfig
from providers.registry import ModelConfig

AGENT_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}"
MAX_INSTRUCTIONS_CHARS = 200_000

MAX_METADATA_BYTES = 16_384

ToolName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]

_AGENT_ID = re.compile(AGENT_ID)


class MemorySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent remembers and is shown of it.

    Attributes:
        enabled: whether sessions and memories are kept at all. Without, each run stands alone.
        context_window: messages of the session's history that the model is shown, in whole turns: an answered turn is
            at least two, so 1 shows next to nothing.
        recall_limit: remembered things that the model is shown.
        wait: seconds that memory may hold the model's request back.
        embeddings: whom to ask for embeddings (recall by meaning); None recalls by words alone.
    """

    enabled: bool = True
    context_window: Annotated[int, Meta(ge=0, le=1000)] = 10
    recall_limit: Annotated[int, Meta(ge=0, le=50)] = 5
    wait: Annotated[float, Meta(ge=0, le=10)] = 0.2
    embeddings: ModelConfig | None = None


class WorkingMemorySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The working memory of an agent's users: a JSON object each.

    Attributes:
        template: the object that a new user begins with.
        max_bytes: capacity of the object as JSON, in bytes.
    """

    template: dict[str, Any] = {}
    max_bytes: Annotated[int, Meta(ge=2, le=65_536)] = 4096

    def __post_init__(self) -> None:
        size = len(msgspec.json.encode(self.template))
        if size > self.max_bytes:
            raise ValueError(f"the template is {size} bytes of JSON, over its max_bytes of {self.max_bytes}")


class AgentRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One agent as it is written down: an ``[[agent]]`` of an agents file, or a body of the agents API.

    Attributes:
        id: what URLs and the OpenAI-compatible ``model`` field name it by.
        system: the system prompt.
        tools: names of the tools that it may call, as ``calculator``, or ``files.*`` for all of MCP server ``files``;
            ``update_working_memory`` comes by itself with ``working_memory``, the other memory tools do not.
        max_steps: model calls of one run.
        max_tool_calls: tool calls of one run.
        deadlines: seconds; what is left out keeps its default. A request can only shorten them.
        stream: how the agent's events are cut unless a request says otherwise.
        working_memory: None for an agent whose users have none.
        metadata: the caller's own, at most 16 KiB as JSON; kept and returned, never read.
    """

    id: str
    llm_config: ModelConfig
    name: Annotated[str, Meta(max_length=200)] = ""
    description: Annotated[str, Meta(max_length=2000)] = ""
    system: Annotated[str, Meta(max_length=MAX_INSTRUCTIONS_CHARS)] = "You are a helpful assistant."
    tools: Annotated[tuple[ToolName, ...], Meta(max_length=128)] = ()
    max_steps: Annotated[int, Meta(ge=1, le=100)] = 5
    max_tool_calls: Annotated[int, Meta(ge=0, le=1000)] = 10
    deadlines: Deadlines = Deadlines()
    stream: StreamingConfig = StreamingConfig()
    memory: MemorySettings = MemorySettings()
    working_memory: WorkingMemorySettings | None = None
    metadata: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if not _AGENT_ID.fullmatch(self.id):
            raise ValueError(
                f"the id {self.id!r} is not up to 100 letters, digits and . _ : - that begin with a letter or digit"
            )
        size = len(msgspec.json.encode(self.metadata))
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is {size} bytes of JSON, over {MAX_METADATA_BYTES}")
        if self.working_memory is not None and not self.memory.enabled:
            raise ValueError("an agent whose memory is not enabled has no working_memory")
