"""Chats: a message starts a run, which is streamed, answered whole, or streamed the old way."""

from __future__ import annotations

from math import ceil
from typing import Literal

import msgspec
from quart import Response

from engine import AgentStopped, Error, GenerationComplete, Run, RunSpec, RunSupervisor, Usage
from engine.agent import begin_turn
from engine.memory import TurnRecord
from engine.pieces import FinishReason

from .agent_access import find_chat_agent
from .auth import resolve_user
from .availability import or_unavailable
from .errors import ApiError, draining
from .requests import ChatRequest
from .routing import API, STREAM, Call, Reply, Route
from .simulated import SimulatedBody
from .sse import EventStreamBody, stream_response

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


async def chat_stream(call: Call[ChatRequest, None]) -> Response:
    """Start a run and stream its events."""
    run = await start_run(call)
    return stream_response(EventStreamBody(run.log, after=0), headers=run_headers(run))


async def chat_whole(call: Call[ChatRequest, None]) -> Reply:
    """Start a run and answer once it is over."""
    run = await start_run(call)
    with run.log.attached():
        cursor = 0
        while entries := await run.log.read(cursor):
            cursor = entries[-1].seq
    return Reply(whole_answer(run), run_headers(run))


async def chat_simulated(call: Call[ChatRequest, None]) -> Response:
    """Start a run, and once it is over stream it cut into pieces, as the old system did."""
    run = await start_run(call)
    headers = run_headers(run)
    del headers["Location"]  # its numbers are not the log's
    return stream_response(SimulatedBody(run.log), headers=headers)


async def start_run(call: Call[ChatRequest, None]) -> Run:
    """The run that the request asks for, started; the user's message is kept by then.

    Raises:
        ApiError: it may not, or cannot, be started.
    """
    services, caller = call.services, call.caller
    user_id = resolve_user(caller, call.body.user_id)
    agent = await find_chat_agent(call, user_id)
    spec = call.body.run_spec(agent, services.resume_grace)
    if services.gatekeeper is None:
        return await _start(call, spec)
    slot = await services.gatekeeper.open_run(caller)
    try:
        return await _start(call, msgspec.structs.replace(spec, on_ended=slot.run_ended))
    except BaseException:
        slot.close()
        raise


async def _start(call: Call[ChatRequest, None], spec: RunSpec) -> Run:
    """Keep the message, then start the run. Nothing waits in between, so that neither is without the other."""
    supervisor = call.services.supervisor
    _check_not_draining(supervisor)
    run_id = supervisor.new_run_id()
    await or_unavailable(begin_turn, spec, run_id)
    if supervisor.draining:  # since a moment ago
        await or_unavailable(_give_up, spec, run_id)
    _check_not_draining(supervisor)
    return supervisor.start(spec, run_id)


def _check_not_draining(supervisor: RunSupervisor) -> None:
    if supervisor.draining:
        raise draining()


async def _give_up(spec: RunSpec, run_id: str) -> None:
    """Keep that a run whose message is kept will not be."""
    if spec.memory_use is not None:
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
        await spec.memory_use.memory.save_turn(turn)


def run_headers(run: Run) -> dict[str, str]:
    """The headers that tell which run a response is of."""
    location = f"{API}/runs/{run.id}/events"
    return {"X-Run-Id": run.id, "X-Session-Id": run.spec.owner.session_id, "Location": location}


def whole_answer(run: Run) -> WholeAnswer:
    """The ended run as one answer.

    Raises:
        ApiError: the run ended in an error: 503 with the event's own code, 500 for a bug of ours.
    """
    match run.log.terminal:
        case GenerationComplete() | AgentStopped() as ended:
            return WholeAnswer(
                message_id=run.id,
                content=run.response,
                memories_updated=run.memory_updates > 0,
                memories_count=run.memory_updates,
                processing_time_ms=run.elapsed_ms,
                run_id=run.id,
                usage=run.usage,
                finish_reason="stopped" if isinstance(ended, AgentStopped) else ended.finish_reason,
            )
        case Error(code, content, response, retry_after=retry_after):
            details = {"run_id": run.id, "response": response}
            headers = {} if retry_after is None else {"Retry-After": str(ceil(retry_after))}
            raise ApiError(500 if code == "internal" else 503, code, content, details, headers)
    raise AssertionError("the run has not ended")


_PATH = "/agents/{agent_id}/chat/lumosai"
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
        answer=STREAM,
        answer_headers=_RUN_HEADERS,
        example=EXAMPLE,
    ),
    Route(
        method="POST",
        path=f"{API}{_PATH}",
        aliases=(f"/api{_PATH}",),
        handler=chat_whole,
        summary="Start a run and answer it whole",
        tag="Chat",
        body=ChatRequest,
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
        answer=STREAM,
        answer_headers={name: text for name, text in _RUN_HEADERS.items() if name != "Location"},
        example=EXAMPLE,
    ),
)
