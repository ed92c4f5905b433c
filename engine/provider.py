"""What the engine asks of a model: the request it hands over and the protocol that answers it."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from .pieces import Emit

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that the model made in an earlier turn; ``arguments`` is JSON text as the model wrote it."""

    call_id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of the conversation. ``tool_calls`` only on assistant turns, ``tool_call_id`` only on tool turns."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool as the model sees it; ``parameters`` is a JSON Schema object."""

    name: str
    description: str
    parameters: dict[str, Any]


class ModelRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that one model call needs: the whole conversation, never one prompt string.

    ``extra`` passes vendor options through untouched.
    """

    messages: tuple[Message, ...]
    model: str
    tools: tuple[ToolSpec, ...] = ()
    temperature: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    extra: dict[str, Any] = {}


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
