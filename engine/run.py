"""One run: one nursery that owns the model's stream, under the scopes that can end it.

Whatever ends a run - an answer, a failure, a deadline, a stop, a reader gone, a bug - appends exactly one terminal
event to its log; the first to do so wins, and everything the run started is gone when ``execute`` returns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import Protocol

import msgspec
import trio

from .deadlines import Deadlines, Progress
from .emitter import Emitter, StreamingConfig, encodable
from .errors import ErrorCode, OutputLimitError, ProviderError
from .events import (
    AgentStarted,
    AgentStopped,
    Error,
    GenerationComplete,
    Metadata,
    StepComplete,
    TerminalEvent,
    Usage,
    UsageUpdate,
)
from .log import RunLog
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
from .provider import ModelRequest, Provider
from .usage import estimated_usage, reported_usage

FIRST_READER_SECONDS = 5.0
"""How long a new run waits for its first reader, whatever its grace: the request that started it may die in between."""

MAX_RUN_BYTES = 8 * 2**20
STOPPED_BY_REQUEST = "requested"
STOPPED_WITHOUT_READER = "disconnect"

_logger = logging.getLogger(__name__)


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run needs to know: which model, what to ask it, and the run's limits.

    Attributes:
        resume_grace: seconds that the run goes on without a reader; 0 = ends at once, ``inf`` = goes on.
        max_run_bytes: bound of the log's frames before the terminal event, which repeats the answer, so that the whole
            log stays within twice this and ``CLOSING_BYTES``; past it the run ends in ``output_limit``.
    """

    agent_id: str
    provider: Provider
    request: ModelRequest
    deadlines: Deadlines = Deadlines()
    streaming: StreamingConfig = StreamingConfig()
    resume_grace: float = 5.0
    max_run_bytes: int = MAX_RUN_BYTES

    def __post_init__(self) -> None:
        if not self.resume_grace >= 0:
            raise ValueError("resume_grace is a number of seconds, at least 0")


class RunObserver(Protocol):
    """Hears of the turning points of every run. Synchronous; should not raise: what it raises is logged and dropped."""

    def run_started(self, run: Run) -> None:
        """The first event is in the log."""
        ...

    def run_first_token(self, run: Run) -> None:
        """The first content piece came; ``run.ttfb`` is known."""
        ...

    def run_ended(self, run: Run) -> None:
        """The terminal event is in the log (``run.log.terminal``)."""
        ...

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """A bug of ours ended the run; its traceback is for the operator, not for clients."""
        ...


class SilentObserver:
    """An observer that does nothing."""

    def run_started(self, run: Run) -> None:
        """Do nothing."""

    def run_first_token(self, run: Run) -> None:
        """Do nothing."""

    def run_ended(self, run: Run) -> None:
        """Do nothing."""

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """Do nothing."""


def utc_now() -> datetime:
    """The wall clock: for timestamps that people read, never for durations."""
    return datetime.now(UTC)


class Run:
    """A run and its log. Whoever creates it awaits ``execute`` in a task that it owns; readers only read the log.

    The log begins at once, so that a run can be stopped and read before its task takes the first step.
    """

    def __init__(
        self,
        run_id: str,
        spec: RunSpec,
        observer: RunObserver | None = None,
        wall_clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.id = run_id
        self.spec = spec
        self.log = RunLog(run_id)
        self.started_at = trio.current_time()
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self._emitter = Emitter(self.log, spec.streaming, spec.max_run_bytes)
        self._observer: RunObserver = observer or SilentObserver()
        self._usage: Usage | None = None
        self._answered_by: AnsweredByPiece | None = None
        self._finish_reason: FinishReason | None = None
        self._steps = 0
        # Ends the run from outside. Its deadline is the grace of the readers: no timer task.
        self._scope = trio.CancelScope(deadline=self.started_at + max(spec.resume_grace, FIRST_READER_SECONDS))
        self.log.on_readers_changed = self._readers_changed
        self._emitter.emit(AgentStarted(spec.agent_id, run_id, wall_clock().isoformat()))
        self._emit_metadata()
        self._tell(self._observer.run_started)

    @property
    def ttfb(self) -> float | None:
        """Seconds from the start to the first content piece."""
        return None if self.first_token_at is None else self.first_token_at - self.started_at

    @property
    def elapsed(self) -> float:
        """Seconds from the start to the end, or to now."""
        return (trio.current_time() if self.ended_at is None else self.ended_at) - self.started_at

    @property
    def response(self) -> str:
        """The answer's text so far; of an ended run, its terminal event's."""
        terminal = self.log.terminal
        return self._emitter.response if terminal is None else terminal.response

    @property
    def usage(self) -> Usage | None:
        """Token counts so far: the vendor's, else an estimate; None before anything was said.

        Of an ended run, the terminal event's: reckoned once.
        """
        if self.log.terminal is not None:
            return self.log.terminal.usage
        usage = self._usage
        if self._finish_reason is None and self.first_token_at is not None:
            usage = estimated_usage(self.spec.request, self.response, self._emitter.reasoned, reported=usage)
        if usage is None or self._answered_by is None:
            return usage
        return msgspec.structs.replace(usage, provider=self._answered_by.provider, model=self._answered_by.model)

    async def execute(self) -> None:
        """Run to the end. Raises nothing but what cancels the task itself; the log has its terminal event then.

        What only a living run needs is dropped: an ended one is its log, the times and the names.
        """
        try:
            if not self.log.ended:  # else before its first step: the model is not asked
                await self._execute()
        finally:
            self._emitter.forget()
            self.spec = msgspec.structs.replace(self.spec, request=ModelRequest((), self.spec.request.model))

    async def _execute(self) -> None:
        try:
            with (
                self._scope,
                trio.CancelScope(deadline=self.started_at + self.spec.deadlines.total) as total,
            ):
                async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - tool calls join it
                    nursery.start_soon(self._answer)
            if total.cancelled_caught:
                self.fail(
                    "timeout.total",
                    f"the run took longer than {self.spec.deadlines.total:g} s",
                )
            elif self._scope.cancelled_caught:
                self.stop(STOPPED_WITHOUT_READER)
        except* Exception as bugs:  # noqa: BLE001 - the run's last line: a bug ends this run and no other
            self._tell(self._observer.run_crashed, bugs)
            self.fail("internal", _INTERNAL_TEXT)
        finally:
            self.fail("interrupted", "the server ended the run")

    def stop(self, reason: str = STOPPED_BY_REQUEST) -> bool:
        """End the run with a ``stop`` event, now. False, and nothing done, if it has ended already."""
        if self.log.ended:
            return False
        self._end(lambda: AgentStopped(short(reason), self.response, self.usage))
        self._scope.cancel(reason=f"run stopped: {reason}")
        return True

    def fail(self, code: ErrorCode, content: str, retry_after: float | None = None) -> bool:
        """End the run with an ``error`` event, now. False, and nothing done, if it has ended already."""
        if self.log.ended:
            return False
        self._end(lambda: Error(code, short(content), self.response, self.usage, retry_after))
        self._scope.cancel(reason=f"run failed: {code}")
        return True

    def _end(self, terminal: Callable[[], TerminalEvent]) -> None:
        """End the log. Never raises: an event that cannot be built or encoded gives way to one that always can."""
        self.ended_at = trio.current_time()
        try:
            self._emitter.emit(terminal())
        except Exception as bug:  # noqa: BLE001 - as in ``execute``, which this may be called from
            self._emitter.emit(Error("internal", _INTERNAL_TEXT, self.response))  # the emitter keeps no other text
            self._tell(self._observer.run_crashed, bug)
        self._tell(self._observer.run_ended)

    def _tell(self, turning_point: Callable[..., None], *details: object) -> None:
        try:
            turning_point(self, *details)
        except Exception:
            _logger.exception("an observer failed at %s of run %s", turning_point, self.id)

    def _readers_changed(self, readers: int) -> None:
        self._scope.deadline = inf if readers else trio.current_time() + self.spec.resume_grace

    def _emit_metadata(self) -> None:
        if self.spec.streaming.emit_metadata:
            self._emitter.emit(Metadata("run_id", self.id))
            self._emitter.emit(Metadata("streaming_mode", "direct"))

    async def _answer(self) -> None:
        """One model call. What is expected to fail becomes the run's terminal event here; only bugs go on."""
        progress = Progress(self.spec.deadlines)
        self._steps += 1
        step_id = f"step-{self._steps}"
        try:
            with progress.scope:
                request = msgspec.structs.replace(self.spec.request, deadlines=self.spec.deadlines)
                await self.spec.provider.stream(request, partial(self._take, progress, step_id))
                await trio.lowlevel.checkpoint_if_cancelled()  # who swallows a cancellation has not answered
        except ProviderError as error:
            await trio.lowlevel.checkpoint_if_cancelled()  # raised in cleanup: what cancelled the run is the reason
            if not progress.scope.cancel_called:
                self.fail(error.code, str(error), error.retry_after)
        if progress.scope.cancel_called:
            self.fail(progress.error_code, _TIMEOUT_TEXTS[progress.phase].format(progress.limit))
        self._complete(step_id)

    def _take(self, progress: Progress, step_id: str, pieces: Sequence[Piece]) -> None:
        """What the provider pushes into: everything that one upstream read brought.

        Once the run has ended, what still comes is dropped: the provider has not met its cancellation yet.
        """
        try:
            self._take_pieces(progress, step_id, pieces)
        except OutputLimitError as error:
            # Not through the provider, which may take it for a failure of its own.
            self.fail("output_limit", str(error))

    def _take_pieces(self, progress: Progress, step_id: str, pieces: Sequence[Piece]) -> None:
        progressed = False
        for piece in pieces:
            if self.log.ended:
                return
            match piece:
                case TextPiece(text) | ReasoningPiece(text):
                    if text and not progressed:
                        progressed = True
                        self._note_content(progress)
                    gather = self._emitter.text if isinstance(piece, TextPiece) else self._emitter.reasoning
                    gather(text, step_id)
                case UsagePiece():
                    usage = reported_usage(piece)
                    if usage != self._usage:  # some vendors report with every chunk
                        self._emitter.emit(UsageUpdate(usage))
                        self._usage = usage
                case FinishPiece(reason):
                    self._finish_reason = reason
                case RequestSentPiece():
                    progress.enter("first_token")
                case AttemptsPiece():
                    progress.enter("attempts")
                case AnsweredByPiece(provider, model):
                    self._answered_by = AnsweredByPiece(short(provider), short(model))
                case ContinuationPiece():
                    pass  # wanted back on a next turn only, and a run has one turn as long as it offers no tools
                case ToolCallPiece():
                    self.fail("upstream.protocol", "the model called a tool, but it was offered none")

    def _note_content(self, progress: Progress) -> None:
        progress.enter("idle")
        if self.first_token_at is None:
            self.first_token_at = trio.current_time()
            self._tell(self._observer.run_first_token)

    def _complete(self, step_id: str) -> None:
        if self._finish_reason == "error":
            self.fail("upstream.server", "the model broke off with an error")
        if self.log.ended:
            return
        self._emitter.emit(StepComplete("Final", step_id))
        self._end(
            lambda: GenerationComplete(
                self.response,
                self._steps,
                elapsed_ms=_milliseconds(self.elapsed),
                ttfb_ms=None if self.ttfb is None else _milliseconds(self.ttfb),
                usage=self.usage,
                finish_reason=self._finish_reason,
            )
        )


MAX_SHORT_CHARS = 1000

_INTERNAL_TEXT = "internal error"
_TIMEOUT_TEXTS = {
    "connect": "no connection to the model within {:g} s",
    "first_token": "no first token from the model within {:g} s",
    "idle": "no token from the model for {:g} s",
}


def short(text: str) -> str:
    """What others put into a terminal event (a vendor's words, names), so that it can be encoded and stays small."""
    return encodable(text[:MAX_SHORT_CHARS])


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
