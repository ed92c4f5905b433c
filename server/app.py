"""The HTTP surface: routes and nothing else. What they need comes in as ``Services``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from engine import AgentStopped, BasicAgent, DrainingError, Error, GenerationComplete, Run, RunSupervisor

from .errors import ApiError, draining, install_error_handlers, json_response, not_found
from .requests import BODY_SECONDS, MAX_BODY_BYTES, ChatRequest, read_json
from .simulated import SimulatedBody
from .sse import EventStreamBody, StreamConnection, requested_cursor, stream_response

API = "/api/v1"


@dataclass(frozen=True)
class Services:
    """What the routes work on: the agents by id, the supervisor of this worker's runs, the default grace in seconds."""

    agents: Mapping[str, BasicAgent]
    supervisor: RunSupervisor
    resume_grace: float = 5.0


class RunView(msgspec.Struct, frozen=True):
    """A run's state as JSON: what ``GET /runs/{id}`` answers. Times in milliseconds since its start."""

    run_id: str
    agent_id: str
    status: str
    last_seq: int
    response: str
    elapsed_ms: float
    ttfb_ms: float | None
    usage: object | None
    terminal: object | None


def create_app(services: Services) -> QuartTrio:
    """The app over these services. It starts nothing and owns nothing: closing them is the caller's."""
    app = QuartTrio("lumos", static_folder=None)
    app.asgi_http_class = StreamConnection
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.config["BODY_TIMEOUT"] = BODY_SECONDS
    install_error_handlers(app)
    _add_health_routes(app, services)
    _add_chat_routes(app, services)
    _add_run_routes(app, services)
    return app


def _add_health_routes(app: QuartTrio, services: Services) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        return json_response({"status": "ok"})

    @app.get("/health/ready")
    async def ready() -> Response:
        if services.supervisor.draining:
            raise draining()
        return json_response({"status": "ok", "active_runs": services.supervisor.active_runs})


def _add_chat_routes(app: QuartTrio, services: Services) -> None:
    async def start_run(agent_id: str) -> Run:
        agent = services.agents.get(agent_id)
        if agent is None:
            raise not_found("agent", agent_id)
        chat = await read_json(request, ChatRequest)
        spec = chat.run_spec(agent, services.resume_grace)
        try:
            return services.supervisor.start(spec)
        except DrainingError as error:
            raise draining() from error

    @app.post("/api/agents/<agent_id>/chat/lumosai/stream")
    @app.post(f"{API}/agents/<agent_id>/chat/lumosai/stream")
    async def chat_stream(agent_id: str) -> Response:
        run = await start_run(agent_id)
        return stream_response(EventStreamBody(run.log, after=0), headers=_run_headers(run))

    @app.post("/api/agents/<agent_id>/chat/lumosai")
    @app.post(f"{API}/agents/<agent_id>/chat/lumosai")
    async def chat_whole(agent_id: str) -> Response:
        run = await start_run(agent_id)
        with run.log.attached():
            cursor = 0
            while entries := await run.log.read(cursor):
                cursor = entries[-1].seq
        return whole_answer(run)

    @app.post("/api/agents/<agent_id>/chat/lumosai/simulated")
    @app.post(f"{API}/agents/<agent_id>/chat/lumosai/simulated")
    async def chat_simulated(agent_id: str) -> Response:
        run = await start_run(agent_id)
        return stream_response(SimulatedBody(run.log), headers={"X-Run-Id": run.id})  # its numbers are not the log's


def _add_run_routes(app: QuartTrio, services: Services) -> None:
    def find(run_id: str) -> Run:
        run = services.supervisor.find(run_id)
        if run is None:
            raise not_found("run", run_id)
        return run

    @app.get(f"{API}/runs/<run_id>")
    async def run_state(run_id: str) -> Response:
        return json_response({"success": True, "data": run_view(find(run_id))})

    @app.get(f"{API}/runs/<run_id>/events")
    async def run_events(run_id: str) -> Response:
        run = find(run_id)
        cursor = requested_cursor(request, run.log)
        if run.log.ended and cursor == run.log.last_seq:
            return Response(b"", status=204, headers={"Cache-Control": "no-store"})
        body = b"" if request.method == "HEAD" else EventStreamBody(run.log, cursor)
        return stream_response(body, headers=_run_headers(run))

    @app.post(f"{API}/runs/<run_id>/stop")
    async def stop_run(run_id: str) -> Response:
        run = find(run_id)
        run.stop()
        return json_response({"success": True, "data": run_view(run)})

    @app.delete(f"{API}/runs/<run_id>")
    async def forget_run(run_id: str) -> Response:
        services.supervisor.forget(find(run_id))
        return Response(b"", status=204)


def _run_headers(run: Run) -> dict[str, str]:
    return {"X-Run-Id": run.id, "Location": f"{API}/runs/{run.id}/events"}


def run_view(run: Run) -> RunView:
    """The run as it stands now."""
    terminal = run.log.terminal
    return RunView(
        run_id=run.id,
        agent_id=run.spec.agent_id,
        status="running" if terminal is None else str(terminal.__struct_config__.tag),
        last_seq=run.log.last_seq,
        response=run.response,
        elapsed_ms=round(run.elapsed * 1000, 3),
        ttfb_ms=None if run.ttfb is None else round(run.ttfb * 1000, 3),
        usage=run.usage,
        terminal=terminal,
    )


def whole_answer(run: Run) -> Response:
    """The ended run as one JSON answer, in the shape of the system that Lumos re-creates.

    ``finish_reason`` is ours: the model's, null if it gave none, or ``stopped``.

    Raises:
        ApiError: the run ended in an error: 503 with the event's own code, 500 for a bug of ours.
    """
    match run.log.terminal:
        case GenerationComplete() | AgentStopped() as ended:
            data = {
                "message_id": run.id,
                "content": run.response,
                "memories_updated": False,
                "memories_count": 0,
                "processing_time_ms": round(run.elapsed * 1000, 3),
                "run_id": run.id,
                "usage": run.usage,
                "finish_reason": "stopped" if isinstance(ended, AgentStopped) else ended.finish_reason,
            }
            return json_response({"success": True, "data": data}, headers=_run_headers(run))
        case Error(code, content, response, retry_after=retry_after):
            details = {"run_id": run.id, "response": response}
            headers = {} if retry_after is None else {"Retry-After": str(ceil(retry_after))}
            raise ApiError(500 if code == "internal" else 503, code, content, details, headers)
    raise AssertionError("the run has not ended")
