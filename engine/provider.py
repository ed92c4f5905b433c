"""What the engine asks of a model: the request it hands over and the protocol that answers it."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from .deadlines import Deadlines, Phases
from .pieces import Emit

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that the model made in an earlier turn; ``arguments`` is JSON text as the model wrote it."""

    call_id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of the conversation.

    Attributes:
        content: the turn's text; may be empty on an assistant turn that only calls tools.
        images: URLs of images that belong to a user turn.
        tool_calls: what an assistant turn called.
        tool_call_id: which call a tool turn answers.
        tool_failed: whether a tool turn tells of a failure.
        continuation: what the adapter named ``continued_by`` wants back with an assistant turn (``ContinuationPiece``).
        continued_by: the provider that ``continuation`` came from; another one must ignore it.
    """

    role: Role
    content: str
    images: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    tool_failed: bool = False
    continuation: Any = None
    continued_by: str | None = None


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool as the model sees it; ``parameters`` is a JSON Schema object."""

    name: str
    description: str
    parameters: dict[str, Any]


class NamedTool(msgspec.Struct, frozen=True):
    """A choice of tool that leaves the model none: it must call this one."""

    name: str


ToolChoice: TypeAlias = Literal["auto", "none", "required"] | NamedTool


class ModelRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that one model call needs: the whole conversation, never one prompt string.

    Attributes:
        tool_choice: whether the model may, must not or must call a tool; None leaves it to the vendor.
        temperature, max_tokens, stop: sampling options; None or empty leaves them to the vendor.
        response_schema: a JSON Schema object that the answer's text must fit (structured output).
        extra: vendor options, passed through untouched as fields of the request's body.
        deadlines: the run's, for providers that make several attempts; the run itself enforces them.
        progress: by which the run enforces them, where a provider that needs no scope of its own may see whether the
            model has missed one; None without a run.
    """

    messages: tuple[Message, ...]
    model: str
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    response_schema: dict[str, Any] | None = None
    extra: dict[str, Any] = {}
    deadlines: Deadlines = Deadlines()
    progress: Phases | None = None


class Provider(Protocol):
    """A model behind a wire format. One object serves many requests at once."""

    name: str

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        """Ask the model and push its answer into ``emit``, one call for all that one upstream read brought.

        Emits ``RequestSentPiece`` once the request is written, then content; returns after the vendor's own end
        mark. Owns its connection: whatever ends the call (return, ``ProviderError``, ``trio.Cancelled``) leaves
        it reusable or closed. Sets no deadlines: the run does.

        Raises:
            ProviderError: the model's side failed; what was emitted stays said.
        """
        ...

    async def aclose(self) -> None:
        """Close what the provider keeps open between requests."""
        ...
