"""What the engine asks of a memory: the conversation so far, what the user told the agent, and a working document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from .errors import ErrorCode
from .events import Usage
from .provider import Message

MemoryKind: TypeAlias = Literal["said", "fact"]
"""``said``: a message of the user's; ``fact``: put down on purpose, by a tool or through the API."""

TurnStatus: TypeAlias = Literal["done", "error", "stop"]


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose run, memory or session a thing is. The empty strings are those of a program without tenants."""

    tenant_id: str = ""
    user_id: str = ""
    session_id: str = ""


class MemoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing remembered; ``created_at`` is UTC, ISO 8601."""

    id: str
    text: str
    kind: MemoryKind
    created_at: str


class WorkingMemoryChange(msgspec.Struct, frozen=True, kw_only=True):
    """What a merge patch did: the document now, and the top-level keys that it set and deleted."""

    document: dict[str, Any]
    set_keys: tuple[str, ...] = ()
    deleted_keys: tuple[str, ...] = ()


class TurnRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a run leaves behind when it ends.

    Attributes:
        messages: what followed the user's message, in order: assistant turns with their tool calls, tool results,
            the answer; of a run that broke off, what there was.
        response: the answer's whole text.
        error_code: of a run that failed.
        total_steps: model calls that were begun.
    """

    run_id: str
    status: TurnStatus
    messages: tuple[Message, ...]
    response: str
    usage: Usage | None
    total_steps: int
    elapsed_ms: float
    ttfb_ms: float | None
    error_code: ErrorCode | None = None
    reason: str | None = None


class MemoryRefusedError(Exception):
    """A memory does not take what it was given (too large, not an object); the text tells the model why."""


class Memory(Protocol):
    """What is remembered of one user by one agent, in one session: bound to its owner when it is made.

    Reads may be abandoned when they take too long. Every method may raise what its storage raises; the run goes on.
    """

    async def begin_turn(self, run_id: str, message: Message) -> None:
        """Keep the user's message, once, before its run starts. Waits for the session's last turn to be kept."""
        ...

    async def history(self, messages: int) -> Sequence[Message]:
        """The last messages of the session, at most so many, whole turns, oldest first, without the turn under way."""
        ...

    async def recall(self, text: str, limit: int) -> Sequence[MemoryEntry]:
        """What has to do with the text, best first; without the messages of this session's history."""
        ...

    async def working_memory(self) -> dict[str, Any] | None:
        """The user's document; None for an agent that has none."""
        ...

    async def remember(self, text: str) -> MemoryEntry:
        """Put down a fact.

        Raises:
            MemoryRefusedError: it is blank or too long.
        """
        ...

    async def search(self, query: str, limit: int) -> Sequence[MemoryEntry]:
        """All that matches the query, best first."""
        ...

    async def forget(self, memory_id: str) -> bool:
        """Delete one entry; False if there is none of that id."""
        ...

    async def patch_working_memory(self, patch: dict[str, Any]) -> WorkingMemoryChange:
        """Change the document by a JSON merge patch (RFC 7396).

        Raises:
            MemoryRefusedError: the agent has no working memory, or the document would be over its capacity.
        """
        ...

    async def save_turn(self, turn: TurnRecord) -> None:
        """Keep what the run said and how it ended; once, a second call changes nothing.

        The run waits for it for some seconds, then cancels it, and asks once only. A memory that does not want to lose
        the turn takes it over then, and when its storage fails.
        """
        ...


class AtHand(NamedTuple):
    """What a memory knows without waiting, once the turn is begun; None is yet to be read."""

    history: Sequence[Message] | None = None
    memories: Sequence[MemoryEntry] | None = None


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """How a run uses its memory.

    Attributes:
        context_window: messages of the session's history that the model is shown.
        recall_limit: remembered things that the model is shown.
        has_document: whether there can be a working memory: else it is not read.
        at_hand: what need not be read; synchronous, does not raise.
        is_prompt: whether reads and ``save_turn`` return at once when they are cancelled, whatever they wait for: they
            then need no task of their own, and without tools the run has no nursery.
        wait: seconds that the reads may hold the model's request back; what has not come by then is gone without.
    """

    memory: Memory
    context_window: int = 10
    recall_limit: int = 5
    wait: float = 0.2
    has_document: bool = True
    at_hand: Callable[[], AtHand] = AtHand
    is_prompt: bool = False

    def __post_init__(self) -> None:
        if self.context_window < 0 or self.recall_limit < 0 or not self.wait >= 0:
            raise ValueError("context_window, recall_limit and wait are at least 0")
