"""One run: one task under the one scope that can end it; where it calls tools, one nursery that owns these too.

Whatever ends a run - an answer, a failure, a deadline, a stop, a reader gone, a bug - appends exactly one terminal
event to its log; the first to do so wins, and everything the run started is gone when ``execute`` returns.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import Any

import trio

from .agent_loop import AgentLoop
from .emitter import Emitter, short
from .errors import ErrorCode
from .events import AgentStarted, AgentStopped, Error, GenerationComplete, Metadata, TerminalEvent, Usage
from .guests import Guests, tamed
from .log import RunLog
from .memory import Memory, TurnRecord, TurnStatus
from .observer import RunObserver, SilentObserver
from .pieces import FinishReason
from .spec import RunSpec
from .trace import Span, Tracer, milliseconds

FIRST_READER_SECONDS = 5.0
"""How long a new run waits for its first reader, whatever its grace: the request that started it may die in between."""

SAVE_SECONDS = 6.0
"""How long a complete run waits for its turn to be kept before it says ``done``. What takes longer, or fails, is the
memory's to bring to an end. Longer than a store's own limit (``BUSY_SECONDS``), so that this gives its reason."""

GUESTS_CLEANUP_SECONDS = 1.0
"""What the tools and the memory of an ended run get to end too; then it counts as over without them."""

STOPPED_BY_REQUEST = "requested"
STOPPED_WITHOUT_READER = "disconnect"

_logger = logging.getLogger(__name__)


def utc_now() -> datetime:
    """The wall clock: for timestamps that people read, never for durations."""
    return datetime.now(UTC)


class Run:
    """A run and its log. Whoever creates it awaits ``execute`` in a task that it owns; readers only read the log.

    The log begins at once, so that a run can be stopped and read before its task takes the first step.

    Attributes:
        ttfb, elapsed: see there; ``started_at``, ``first_token_at`` and ``ended_at`` are on trio's clock.
        ends_at_once: whether ``done`` follows a whole answer without a wait: no memory keeps it before.
        memory_updates: how often the run's tools changed what is remembered.
        on_held: called when the run is over, but ``execute`` does not return, because a tool or the memory does not let
            itself be cancelled. Synchronous.
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
        self.memory_updates = 0
        self.ends_at_once = spec.memory_use is None
        self.on_held: Callable[[Run], None] | None = None
        self._emitter = Emitter(self.log, spec.streaming, spec.max_run_bytes)
        self._observer: RunObserver = observer or SilentObserver()
        self._tracer = Tracer(run_id, spec.trace)
        self._loop = AgentLoop(self, self._emitter, self._tracer)
        self._terminal: TerminalEvent | None = None  # decided; in the log once it is kept
        self._saved = False
        self._is_over = False
        self._over: trio.Event | None = None  # for who waits for it
        self._total_until = self.started_at + spec.deadlines.total
        self._model_until = inf
        self._unread_until = self.started_at + max(spec.resume_grace, FIRST_READER_SECONDS)
        self._due_at = min(self._total_until, self._unread_until)
        self._scope: trio.CancelScope | None = None  # from its task's first step
        self.log.on_readers_changed = self._readers_changed
        self._emitter.emit(AgentStarted(spec.agent_id, run_id, wall_clock().isoformat()))
        if spec.streaming.emit_metadata:
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
    def ttfb_ms(self) -> float | None:
        """``ttfb`` in milliseconds, as events and views tell of it."""
        return None if (ttfb := self.ttfb) is None else milliseconds(ttfb)

    @property
    def elapsed_ms(self) -> float:
        """``elapsed`` in milliseconds, as events and views tell of it."""
        return milliseconds(self.elapsed)

    @property
    def response(self) -> str:
        """The answer's text so far; of an ended run, its terminal event's."""
        terminal = self.log.terminal
        return self._emitter.response if terminal is None else terminal.response

    @property
    def usage(self) -> Usage | None:
        """Token counts of all model calls so far; of an ended run, its terminal event's: reckoned once."""
        return self._loop.usage if self.log.terminal is None else self.log.terminal.usage

    @property
    def input_tokens(self) -> int | None:
        """The input of ``usage``, without reckoning the rest of it: for who asks often."""
        if self.log.terminal is None:
            return self._loop.input_tokens
        return None if self.log.terminal.usage is None else self.log.terminal.usage.input_tokens

    def execute(self) -> Coroutine[Any, Any, None]:
        """Run to the end. Raises nothing but what cancels the task itself; the log has its terminal event then.

        What only a living run needs is dropped: an ended one is its log, the times and the names.
        """
        use = self.spec.memory_use
        if self.spec.tool_use.tools or not (use is None or use.is_prompt):
            return self._execute_with_guests()
        return self._execute(Guests(self.id, self._crash))

    async def _execute_with_guests(self) -> None:
        async with trio.open_nursery() as nursery:
            await self._execute(Guests(self.id, self._crash, nursery))

    async def _execute(self, guests: Guests) -> None:
        span = self._tracer.begin("run", self.spec.agent_id, agent_id=self.spec.agent_id)
        try:
            if not self.log.ended:  # else before its first step: the model is not asked
                # Ends the run from outside, and at the earliest of its deadlines: no timer task.
                self._scope = trio.CancelScope(deadline=self._due_at)
                with self._scope:
                    call = await self._loop.answer(guests, span)
                    if call is not None:
                        await self._complete(guests, call.finish_reason)
                if self._scope.cancelled_caught:
                    self._end_in_time()
        except* Exception as bugs:  # noqa: BLE001 - the run's last line: a bug ends this run and no other
            self._crash(bugs)
        finally:
            self.fail("interrupted", "the server ended the run")
            guests.cancel()
            await self._settle(guests, span)  # noqa: ASYNC102 - each of its waits is shielded and has a limit
            self._is_over = True
            if self._over is not None:
                self._over.set()

    def _end_in_time(self) -> None:
        """Which deadline it was; nothing is done if it was none, but what ended the run before."""
        late = self._loop.lateness if self._model_until < min(self._unread_until, self._total_until) else None
        if late is not None:
            self.fail(late.code, str(late))
        elif self._unread_until <= self._total_until:
            self.stop(STOPPED_WITHOUT_READER)
        else:
            self.fail("timeout.total", f"the run took longer than {self.spec.deadlines.total:g} s")

    async def _complete(self, guests: Guests, finish_reason: FinishReason | None) -> None:
        """The answer is whole: keep it, then say so. Nothing ends the run otherwise in between."""
        self.ended_at = trio.current_time()
        self._terminal = done = GenerationComplete(
            self.response,
            self._loop.steps,
            elapsed_ms=self.elapsed_ms,
            ttfb_ms=self.ttfb_ms,
            usage=self.usage,
            finish_reason=finish_reason,
        )
        try:
            await self._save(guests)
        finally:
            self._end(lambda: done)

    async def _settle(self, guests: Guests, span: Span) -> None:
        """What is left to do once the log has its end: keep the turn, see the guests go, tell of it, let all go."""
        await self._save(guests)
        if guests.names:
            with trio.move_on_after(GUESTS_CLEANUP_SECONDS, shield=True):
                await guests.wait_gone()
        error = self._terminal.code if isinstance(self._terminal, Error) else None
        self._tracer.end(span, error, steps=self._loop.steps, ttfb_ms=self.ttfb_ms)
        self._emitter.forget()
        del self._loop  # with all that it asked and was told
        self.spec = self.spec.emptied()
        on_held, self.on_held = self.on_held, None
        if guests.names:
            _logger.warning("run %s is over, but %s cannot be cancelled", self.id, ", ".join(guests.names))
            if on_held is not None:
                on_held(self)

    async def wait_over(self) -> None:
        """Until the log has its end and the turn is kept, if that can be."""
        if self._over is None:
            self._over = trio.Event()
        if self._is_over:
            self._over.set()
        await self._over.wait()

    def stop(self, reason: str = STOPPED_BY_REQUEST) -> bool:
        """End the run with a ``stop`` event, now. False, and nothing done, if it has ended or is complete."""
        if self._terminal is not None:
            return False
        self._end(lambda: AgentStopped(short(reason), self.response, self.usage))
        if self._scope is not None:
            self._scope.cancel(reason=f"run stopped: {reason}")
        return True

    def fail(self, code: ErrorCode, content: str, retry_after: float | None = None) -> bool:
        """End the run with an ``error`` event, now. False, and nothing done, if it has ended or is complete."""
        if self._terminal is not None:
            return False
        self._end(lambda: Error(code, short(content), self.response, self.usage, retry_after))
        if self._scope is not None:
            self._scope.cancel(reason=f"run failed: {code}")
        return True

    def note_content(self) -> None:
        """The model said something: the first time is the run's TTFB."""
        if self.first_token_at is None:
            self.first_token_at = trio.current_time()
            self._tell(self._observer.run_first_token)

    def expect_by(self, due_at: float) -> None:
        """Without more from the model by then, on trio's clock, the run is cancelled."""
        self._model_until = due_at
        self._move_deadline()

    def _move_deadline(self) -> None:
        """The earliest counts; trio is told only of another one, as that takes it nine calls."""
        due_at = min(self._total_until, self._unread_until, self._model_until)
        if due_at != self._due_at:
            self._due_at = due_at
            if self._scope is not None:
                self._scope.deadline = due_at

    def note_sent(self) -> None:
        """A model was asked: from now on there is ``usage``."""
        self.log.note_news()

    def _end(self, make_terminal: Callable[[], TerminalEvent]) -> None:
        """End the log. Never raises: an event that cannot be built or encoded gives way to one that always can."""
        if self.ended_at is None:
            self.ended_at = trio.current_time()
        try:
            self._terminal = make_terminal()
            self._emitter.emit(self._terminal)
        except Exception as bug:  # noqa: BLE001 - as in ``execute``, which this may be called from
            self._terminal = Error("internal", _INTERNAL_TEXT, self.response)  # the emitter keeps no other text
            self._emitter.emit(self._terminal)
            self._tell(self._observer.run_crashed, bug)
        self._tell(self._observer.run_ended)
        if self.spec.on_ended is not None:
            self._tell(self.spec.on_ended)

    def _crash(self, bug: BaseException) -> None:
        self._tell(self._observer.run_crashed, bug)
        self.fail("internal", _INTERNAL_TEXT)

    def _tell(self, turning_point: Callable[..., None], *details: object) -> None:
        try:
            turning_point(self, *details)
        except Exception:
            _logger.exception("an observer failed at %s of run %s", turning_point, self.id)

    def _readers_changed(self, readers: int) -> None:
        scope = self._scope
        if self._terminal is not None or (scope is not None and scope.cancel_called):
            return
        self._unread_until = inf if readers else trio.current_time() + self.spec.resume_grace
        self._move_deadline()

    def _emit_metadata(self) -> None:
        self._emitter.emit(Metadata("run_id", self.id))
        mode = "function_calling" if self.spec.tool_use.tools else "direct"
        self._emitter.emit(Metadata("streaming_mode", mode))

    async def _save(self, guests: Guests) -> None:
        """Let the memory keep the turn, once, in bounded time; of a run that broke off, what there was."""
        use = self.spec.memory_use
        if use is None or self._terminal is None or self._saved:
            return
        self._saved = True
        save = partial(self._save_turn, use.memory, self._turn_record(self._terminal))
        with trio.move_on_after(SAVE_SECONDS, shield=True) as limit:
            if use.is_prompt:
                await save()
            else:
                await guests.invite("memory save_turn", partial(_shielded, save)).wait()
        if limit.cancelled_caught:
            _logger.error("the turn of run %s was not kept within %g s", self.id, SAVE_SECONDS)

    async def _save_turn(self, memory: Memory, record: TurnRecord) -> None:
        try:
            await tamed(partial(memory.save_turn, record))
        except Exception:
            _logger.exception("the turn of run %s could not be kept", self.id)

    def _turn_record(self, terminal: TerminalEvent) -> TurnRecord:
        return TurnRecord(
            run_id=self.id,
            status=_STATUSES[type(terminal)],
            messages=self._loop.said(),
            response=terminal.response,
            usage=terminal.usage,
            total_steps=self._loop.steps,
            elapsed_ms=self.elapsed_ms,
            ttfb_ms=self.ttfb_ms,
            error_code=terminal.code if isinstance(terminal, Error) else None,
            reason=terminal.reason if isinstance(terminal, AgentStopped) else None,
        )


async def _shielded(save: Callable[[], Awaitable[None]]) -> None:
    with trio.move_on_after(SAVE_SECONDS, shield=True):  # noqa: ASYNC912 - the memory may not need to wait
        await save()


_INTERNAL_TEXT = "internal error"
_STATUSES: dict[type[TerminalEvent], TurnStatus] = {GenerationComplete: "done", Error: "error", AgentStopped: "stop"}
