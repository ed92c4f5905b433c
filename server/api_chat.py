"""Chats: a message starts a run, which is streamed, answered whole, or streamed the old way."""

from __future__ import annotations

from math import ceil
from typing import Literal

import msgspec
import trio
from quart import Response

from engine import AgentStopped, Error, GenerationComplete, Run, RunSpec, RunSupervisor, Usage
from engine.agent import begin_turn
from engine.events import Event
from engine.memory import TurnRecord
from engine.pieces import FinishReason

from .admission import Place
from .agent_access import find_chat_agent
from .auth import resolve_user
from .availability import or_unavailable, unless_unavailable
from .chat_runs import run_of_chat
from .errors import ApiError, draining
from .limits import RunSlot
from .repeats import ResumeQuery
from .requests import ChatRequest
from .routing import API, STREAM, Call, Reply, Route
from .run_access import events_response, run_headers
from .run_view import RunView
from .simulated import SimulatedBody
from .sse import EventStreamBody, cursor_of, requested_cursor, stream_response
from .store.rows import Scope
from .store.turns import begin_run, save_turn

EXAMPLE = {"message": "Hi"}


class WholeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, in the shape of the system that Lumos re-creates.

    Attributes:
        message_id: the run's id.
        memories_updated: whether the run changed what is remembered.
        memories_count: how often it changed it.
        usage: token counts, the vendor's or estimated.
        finish_reason: the model's, null if it gave none, or ``stopped``.
    """

    message_id: str
    content: str
    memories_updated: bool
    memories_count: int
    processing_time_ms: float
    run_id: str
    usage: Usage | None
    finish_reason: FinishReason | Literal["stopped"] | None


async def chat_stream(call: Call[ChatRequest, None]) -> Response | EventStreamBody:
    """Start a run, or join one, and stream its events. What has been started asks its model before all else."""
    run = await run_of_chat(call, start_run)
    for _ in range(2):  # two, so that it has its first steps in whatever order trio's tasks have theirs
        await trio.lowlevel.cancel_shielded_checkpoint()  # as a run that nobody reads yet is not to be left here
    return events_response(call, run)


async def chat_whole(call: Call[ChatRequest, None]) -> Reply:
    """Start a run, or join one, and answer once it is over."""
    run = await run_of_chat(call, start_run)
    terminal: Event | None = None
    with run.log.attached():
        cursor = requested_cursor(call.request, run.log)
        cursor = min(cursor, max(run.log.last_seq - 1, 0))  # its end is wanted again
        while entries := await run.log.read(cursor):
            cursor, terminal = entries[-1].seq, entries[-1].event
    return Reply(whole_answer(run.view(), terminal), run_headers(run))


async def chat_simulated(call: Call[ChatRequest, None]) -> Response:
    """Start a run, or join one, and once it is over stream it cut into pieces, as the old system did."""
    run = await run_of_chat(call, start_run)
    headers = run_headers(run)
    del headers["Location"]  # its numbers are not the log's
    return stream_response(SimulatedBody(run.log, cursor_of(call.request, run.run_id)), headers=headers)


async def start_run(call: Call[ChatRequest, None], run_id: str | None = None) -> Run:
    """The run that the request asks for, started, of that id if one is given; the user's message is kept by then.

    Raises:
        ApiError: it may not, or cannot, be started.
    """
    services, caller = call.services, call.caller
    user_id = resolve_user(caller, call.body.user_id)
    agent = await find_chat_agent(call, user_id)
    spec = call.body.run_spec(agent, services.resume_grace)
    taken = _Taken()
    try:
        if services.gatekeeper is not None:
            taken.slot = await services.gatekeeper.open_run(caller)
        _check_not_draining(services.supervisor)
        if services.admission is not None:
            taken.place = await services.admission.enter(caller.key_id)
        return await _start(call, msgspec.structs.replace(spec, on_ended=taken.run_ended), run_id)
    except BaseException:
        taken.close()
        raise


class _Taken:
    """What a run takes: its place with its key, and with this worker. Given back at its end, or if it cannot start."""

    __slots__ = ("place", "slot")

    def __init__(self) -> None:
        self.slot: RunSlot | None = None
        self.place: Place | None = None

    def run_ended(self, run: Run) -> None:
        """For ``RunSpec.on_ended``."""
        if self.slot is not None:
            self.slot.run_ended(run)
        self.close()

    def close(self) -> None:
        """Give it back."""
        for held in (self.place, self.slot):
            if held is not None:
                held.close()


async def _start(call: Call[ChatRequest, None], spec: RunSpec, run_id: str | None) -> Run:
    """Keep the message, then start the run. Nothing waits in between, so that neither is without the other."""
    supervisor = call.services.supervisor
    _check_not_draining(supervisor)
    run_id = run_id or supervisor.new_run_id()
    await _begin(call, spec, run_id)
    if supervisor.draining:  # since a moment ago
        await _give_up(call, spec, run_id)
    _check_not_draining(supervisor)
    return supervisor.start(spec, run_id)


def _check_not_draining(supervisor: RunSupervisor) -> None:
    if supervisor.draining:
        raise draining()


async def _begin(call: Call[ChatRequest, None], spec: RunSpec, run_id: str) -> None:
    """Have it in the store that the run is under way: after the death of this process somebody must end it."""
    if spec.memory_use is not None:
        await unless_unavailable(begin_turn, spec, run_id)
    elif call.services.database is not None:
        scope = Scope(spec.owner.tenant_id, spec.owner.user_id, spec.agent_id)
        now = call.services.now()
        await call.services.write(begin_run, scope, spec.owner.session_id, run_id, call.caller.key_id, now)


async def _give_up(call: Call[ChatRequest, None], spec: RunSpec, run_id: str) -> None:
    """Keep that a run which is known to be under way will not be."""
    turn = TurnRecord(
        run_id=run_id,
        status="error",
        messages=(),
        response="",
        usage=None,
        total_steps=0,
        elapsed_ms=0.0,
        ttfb_ms=None,
        error_code="draining",
    )
    if spec.memory_use is not None:
        await or_unavailable(spec.memory_use.memory.save_turn, turn)
    elif call.services.database is not None:
        await call.services.write(save_turn, turn, call.services.now())


def whole_answer(run: RunView, terminal: Event | None) -> WholeAnswer:
    """The ended run as one answer.

    Raises:
        ApiError: the run ended in an error: 503 with the event's own code, 500 for a bug of ours.
    """
    match terminal:
        case GenerationComplete() | AgentStopped() as ended:
            return WholeAnswer(
                message_id=run.run_id,
                content=ended.response,
                memories_updated=run.memory_updates > 0,
                memories_count=run.memory_updates,
                processing_time_ms=run.elapsed_ms or 0.0,
                run_id=run.run_id,
                usage=ended.usage,
                finish_reason="stopped" if isinstance(ended, AgentStopped) else ended.finish_reason,
            )
        case Error(code, content, response, retry_after=retry_after):
            details = {"run_id": run.run_id, "response": response}
            headers = {} if retry_after is None else {"Retry-After": str(ceil(retry_after))}
            raise ApiError(500 if code == "internal" else 503, code, content, details, headers)
    raise AssertionError("the run has not ended")


_PATH = "/agents/{agent_id}/chat/lumosai"
_REPEATED = {
    "Idempotency-Key": "Requests with the same key and body are one run: a repeated one joins it.",
    "Last-Event-ID": "The id of the last event that the client has: the run goes on after it, and none is started.",
}
_RUN_HEADERS = {
    "X-Run-Id": "The run's id.",
    "X-Session-Id": "The session that the message belongs to.",
    "Location": "Where the run's events can be read again.",
}

ROUTES = (
    Route(
        method="POST",
        path=f"{API}{_PATH}/stream",
        aliases=(f"/api{_PATH}/stream",),
        handler=chat_stream,
        summary="Start a run and stream it",
        tag="Chat",
        body=ChatRequest,
        query=ResumeQuery,
        raw_query=True,
        headers=_REPEATED,
        refusals=(404, 409, 410),
        answer=STREAM,
        also={204: "The run is over, and all its events were delivered before."},
        answer_headers=_RUN_HEADERS,
        example=EXAMPLE,
        direct=True,
    ),
    Route(
        method="POST",
        path=f"{API}{_PATH}",
        aliases=(f"/api{_PATH}",),
        handler=chat_whole,
        summary="Start a run and answer it whole",
        tag="Chat",
        body=ChatRequest,
        query=ResumeQuery,
        raw_query=True,
        headers=_REPEATED,
        refusals=(404, 409, 410),
        answer=WholeAnswer,
        answer_headers=_RUN_HEADERS,
        example=EXAMPLE,
    ),
    Route(
        method="POST",
        path=f"{API}{_PATH}/simulated",
        aliases=(f"/api{_PATH}/simulated",),
        handler=chat_simulated,
        summary="The old way, for comparison: generate everything, then cut it up",
        tag="Chat",
        body=ChatRequest,
        query=ResumeQuery,
        raw_query=True,
        headers=_REPEATED,
        refusals=(404, 409, 410),
        answer=STREAM,
        answer_headers={name: text for name, text in _RUN_HEADERS.items() if name != "Location"},
        example=EXAMPLE,
    ),
)
