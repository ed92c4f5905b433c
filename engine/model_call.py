"""One model call of a run: asks the provider under the progress deadlines and turns its pieces into events."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from threading import get_ident
from typing import Any, Protocol

import msgspec
import trio

from .deadlines import Phases
from .emitter import MAX_SHORT_CHARS, Emitter, encodable, nests_too_deep, short
from .errors import REFUSAL_CODES, ErrorCode, OutputLimitError, ProviderError
from .events import ToolCallDelta, ToolCallStart, Usage, UsageUpdate
from .pieces import (
    AnsweredByPiece,
    AttemptsPiece,
    ContinuationPiece,
    FinishPiece,
    FinishReason,
    Piece,
    ReasoningPiece,
    RequestSentPiece,
    TextPiece,
    ToolCallPiece,
    UsagePiece,
)
from .provider import Message, ModelRequest, Provider, ToolCall
from .usage import add_usage, estimated_usage, reported_usage

NAMELESS_PIECE_BYTES = 256
"""What a piece of a call without a name yet is charged beyond its text, for the objects that it takes."""

_TIMEOUT_TEXTS = {
    "connect": "no connection to the model within {:g} s",
    "first_token": "no first token from the model within {:g} s",
    "idle": "no token from the model for {:g} s",
}


class CallInProgress(msgspec.Struct):
    """A tool call while the model writes it.

    Attributes:
        call_id: unique in the run, in events.
        model_id: what the model's side knows the call by; unique in its step.
    """

    call_id: str = ""
    model_id: str = ""
    name: str = ""
    written: list[str] = []

    @property
    def arguments(self) -> str:
        """The arguments as the model wrote them, JSON text."""
        return "".join(self.written)

    @property
    def arguments_value(self) -> Any:
        """The arguments as the object that they are, or as text if they are none."""
        value = json_object(self.arguments)
        return self.arguments if value is None else value


class UniqueIds:
    """Gives out each id once: one that is taken gets a number after it (vendors repeat themselves)."""

    __slots__ = ("_repeats",)

    def __init__(self) -> None:
        self._repeats: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """The id itself if it is free; cut where it is very long."""
        wanted = taken = wanted[:MAX_SHORT_CHARS]
        number = self._repeats.get(wanted, 1)
        while taken in self._repeats:
            number += 1  # goes on from the last repetition's: a model that repeats one id costs no search
            taken = f"{wanted}-{number}"
        self._repeats[wanted] = number
        self._repeats.setdefault(taken, 1)
        return taken


class CallOwner(Protocol):
    """The run that a model call belongs to.

    Attributes:
        ends_at_once: whether its end follows a whole answer before anybody else can run.
    """

    ends_at_once: bool

    def fail(self, code: ErrorCode, content: str, retry_after: float | None = None) -> bool:
        """End the run, and with it the call: for what the model may not do, which is no failure of the provider's."""
        ...

    def note_content(self) -> None:
        """A model said something for the first time in its call."""
        ...

    def note_sent(self) -> None:
        """The model was sent its request."""
        ...

    def expect_by(self, due_at: float) -> None:
        """Without more from the model by then, on trio's clock, the run is cancelled."""
        ...


class ModelCall:
    """One step's model call, while it goes on and after it.

    Args:
        run: whose call it is.
        emitter: where events go.
        call_ids: the ids of the run's tool calls; this call takes its own.
        spent: what the steps before have used.
    """

    def __init__(
        self,
        step_id: str,
        request: ModelRequest,
        run: CallOwner,
        emitter: Emitter,
        call_ids: UniqueIds,
        spent: Usage | None = None,
    ) -> None:
        self.step_id = step_id
        self._progress = Phases(request.deadlines, run.expect_by)
        self.request = msgspec.structs.replace(request, progress=self._progress)
        self.finish_reason: FinishReason | None = None
        self.answered_by: AnsweredByPiece | None = None
        self._run = run
        self._emitter = emitter
        self._call_ids = call_ids
        self._model_ids: UniqueIds | None = None  # with the first tool call
        self._spent = spent
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, CallInProgress] = {}
        self._nameless_bytes = 0
        self._reported: Usage | None = None
        self._continuation: Any = None
        self._any_content = False
        self._is_billed = False
        self._thread = get_ident()
        self._clock = trio.lowlevel.current_clock()

    @property
    def text(self) -> str:
        """What this step said so far."""
        return encodable("".join(self._text))

    @property
    def calls(self) -> list[CallInProgress]:
        """The tool calls so far, in the model's order."""
        return [self._calls[index] for index in sorted(self._calls)] if self._calls else []

    @property
    def usage(self) -> Usage | None:
        """Tokens of this call: the vendor's count, else an estimate; None before it was asked, or if it refused."""
        if self.finish_reason is not None and self._reported is not None:
            return self._reported
        if not (self._any_content or self._is_billed):
            return self._reported
        written = "".join([self.text, *(call.name + call.arguments for call in self._calls.values())])
        return estimated_usage(self.request, written, "".join(self._reasoning), reported=self._reported)

    @property
    def input_tokens(self) -> int | None:
        """The input of ``usage``; reckoned once."""
        if self._reported is not None:
            return self._reported.input_tokens
        return self._estimated_input if self._any_content or self._is_billed else None

    @cached_property
    def _estimated_input(self) -> int:
        return estimated_usage(self.request, "").input_tokens

    def facts(self) -> dict[str, Any]:
        """What a trace tells of the call."""
        usage = self.usage
        facts = {
            "finish_reason": self.finish_reason,
            "input_tokens": usage.input_tokens if usage else None,
            "output_tokens": usage.output_tokens if usage else None,
            "answered_by": self.answered_by.provider if self.answered_by else None,
            "tool_calls": len(self._calls) or None,
        }
        return {name: fact for name, fact in facts.items() if fact is not None}

    @property
    def lateness(self) -> ProviderError | None:
        """The failure of a call whose progress deadline has passed (``timeout.…``)."""
        if not self._progress.missed:
            return None
        text = _TIMEOUT_TEXTS[self._progress.phase].format(self._progress.limit)
        return ProviderError(self._progress.error_code, text)

    async def ask(self, provider: Provider) -> None:
        """Ask, and take the whole answer. At a progress deadline the run is cancelled: ``lateness`` then tells why.

        Raises:
            ProviderError: the model's side failed, or has ended too late.
        """
        try:
            await provider.stream(self.request, self._take)
            await trio.lowlevel.checkpoint_if_cancelled()  # who swallows a cancellation has not answered
        except ProviderError as error:
            # Raised in cleanup, it is not what ended the call: what cancelled the run is the reason.
            await trio.lowlevel.checkpoint_if_cancelled()  # noqa: ASYNC120 - so it is to be lost
            if self.lateness is None:
                self._is_billed = self._is_billed and error.code not in REFUSAL_CODES
                raise
        if (lateness := self.lateness) is not None:
            raise lateness
        if self.finish_reason == "error":
            raise ProviderError("upstream.server", "the model broke off with an error")
        if not all(call.name for call in self._calls.values()):
            raise ProviderError("upstream.protocol", "the model called a tool without naming it")

    def as_message(self, provider: str) -> Message:
        """The assistant's turn, for the next request and for the history."""
        continued_by = self.answered_by.provider if self.answered_by else provider
        return Message(
            "assistant",
            self.text,
            tool_calls=tuple(ToolCall(call.model_id, call.name, call.arguments) for call in self.calls),
            continuation=self._continuation,
            continued_by=continued_by if self._continuation is not None else None,
        )

    def _take(self, pieces: Sequence[Piece]) -> None:
        """What the provider pushes into: everything that one upstream read brought."""
        if get_ident() != self._thread:  # waking the log's readers from there would end every run of the process
            raise RuntimeError("a provider emits in its run's own thread: use trio.from_thread.run_sync")
        now = self._clock.current_time()
        log = self._emitter.log
        log.hold()
        try:
            self._take_pieces(pieces, now)
        except OutputLimitError as error:
            self._run.fail("output_limit", str(error))
        finally:
            log.release(more_follows=self.finish_reason is not None and self._run.ends_at_once, now=now)

    def _take_pieces(self, pieces: Sequence[Piece], now: float) -> None:
        """Take them in order; texts that follow each other are taken as one, as a fast model's read brings hundreds."""
        progressed = False
        texts: list[str] = []
        for piece in pieces:
            if isinstance(piece, TextPiece):
                texts.append(piece.text)
                continue
            if texts:
                progressed = self._take_texts(texts, progressed, now)
                texts = []
            if self._emitter.log.ended:  # the provider has not met its cancellation yet
                return
            progressed = self._take_other(piece, progressed, now)
        if texts:
            self._take_texts(texts, progressed, now)

    def _take_texts(self, texts: list[str], progressed: bool, now: float) -> bool:
        """Whether there was progress now. Of too many, those are taken that the run has room for."""
        if self._emitter.log.ended:
            return progressed
        text = texts[0] if len(texts) == 1 else "".join(texts)
        progressed = progressed or self._progresses(text, now)
        try:
            self._take_text(text, now)
        except OutputLimitError:
            for one in texts:
                self._take_text(one, now)
            raise
        return progressed

    def _take_other(self, piece: Piece, progressed: bool, now: float) -> bool:
        """Take a piece that is no text; whether there was progress now."""
        match piece:
            case ReasoningPiece(text):
                progressed = progressed or self._progresses(text, now)
                self._emitter.reasoning(text, self.step_id)
                self._reasoning.append(text)
            case ToolCallPiece(_, call_id, name, fragment):
                if self.request.tools:
                    progressed = progressed or self._progresses(call_id or name or fragment, now)
                self._take_call(piece)
            case UsagePiece():
                self._take_usage(reported_usage(piece))
            case FinishPiece(reason):
                self.finish_reason = reason
            case RequestSentPiece():
                self._is_billed = True
                self._run.note_sent()
                if self._progress.phase != "attempts":
                    self._progress.enter("first_token", now)
            case AttemptsPiece():
                self._progress.enter("attempts", now)
            case AnsweredByPiece(provider, model):
                self.answered_by = AnsweredByPiece(short(provider), short(model))
            case ContinuationPiece(state):
                self._continuation = state
        return progressed

    def _progresses(self, content: str | None, now: float) -> bool:
        """Whether that is progress: content is. It keeps the idle deadline off, once for all that one read brought."""
        if not content:
            return False
        self._progress.enter("idle", now)
        if not self._any_content:
            self._any_content = True
            self._run.note_content()
        return True

    def _take_text(self, text: str, now: float) -> None:
        if text:
            self._emitter.text(text if self._text else self._emitter.gap_before(text) + text, self.step_id, now)
            self._text.append(text)

    def _take_usage(self, usage: Usage) -> None:
        if usage != self._reported:  # some vendors report with every chunk
            self._emitter.emit(UsageUpdate(add_usage(self._spent, usage)))
            self._reported = usage

    def _take_call(self, piece: ToolCallPiece) -> None:
        if not self.request.tools:
            self._run.fail("upstream.protocol", "the model called a tool, but it was offered none")
            return
        if not (piece.call_id or piece.name or piece.arguments_fragment):
            return
        call = self._calls.setdefault(piece.index, CallInProgress(written=[]))
        call.model_id = call.model_id or encodable(piece.call_id or "")
        fragment = encodable(piece.arguments_fragment)
        if call.name:
            self._write(call, fragment)
        elif piece.name:
            call.name = encodable(piece.name)
            self._start(call, piece.index, fragment)
        else:  # not told of yet, but it counts
            call.written.append(fragment)
            self._nameless_bytes += len(fragment) + NAMELESS_PIECE_BYTES
            self._emitter.check_room(self._nameless_bytes)

    def _start(self, call: CallInProgress, index: int, fragment: str) -> None:
        """Tell of the call, with its arguments if they are there whole (some vendors send calls in one piece)."""
        self._model_ids = self._model_ids or UniqueIds()
        call.model_id = self._model_ids.take(call.model_id or f"{self.step_id}-call-{index}")
        call.call_id = self._call_ids.take(call.model_id)
        written = call.arguments + fragment
        whole = json_object(written) if written else None
        self._emitter.emit(ToolCallStart(call.call_id, call.name, self.step_id, whole))
        call.written = [written] if whole is not None else []
        if whole is None:
            self._write(call, written)

    def _write(self, call: CallInProgress, fragment: str) -> None:
        if fragment:
            self._emitter.emit(ToolCallDelta(call.call_id, fragment, self.step_id))
            call.written.append(fragment)


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, if it can go into a frame; else None. No text is the empty object."""
    try:
        value: dict[str, Any] = msgspec.json.decode(text or "{}", type=dict[str, Any])
        encoded = msgspec.json.encode(value)  # a lone surrogate is read, and could not be written
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return None if nests_too_deep(encoded) else value
