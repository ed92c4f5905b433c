"""How a route is written down, and the one way that every request takes: caller, ids, query, body, handler, answer."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
import structlog
from quart import Response, Websocket, request
from quart_trio import QuartTrio

from .asked import Asked
from .direct import DirectRoute, DirectRoutes, Respond
from .errors import ApiError, answer_error, json_response, not_found
from .guard import RequestGuard
from .key_watch import KeyWatch
from .principal import LOCAL_USER, Principal
from .records import AGENT_ID
from .requests import JSON_MEDIA_TYPE, SESSION_ID, read_json
from .services import Services
from .share_links import TOKEN
from .sse import EventStreamBody, WatchedBody, stream_response

API = "/api/v1"
_ID_IN_PATH = re.compile(r"\{(\w+)\}")

BodyT = TypeVar("BodyT")
QueryT = TypeVar("QueryT")

Method: TypeAlias = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


class Special(Enum):
    """Answers that are no JSON of ours."""

    STREAM = "text/event-stream"
    PAGE = "text/html"
    DOCUMENT = "application/json"


STREAM = Special.STREAM


@dataclass(frozen=True)
class PathId:
    """An id in a path: of what kind of thing, and which ids can be there at all. Any other is a thing that is not."""

    what: str
    pattern: str

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.ASCII)

    def fits(self, text: str) -> bool:
        """Whether there can be such an id."""
        return self._regex.fullmatch(text) is not None


PATH_IDS: Mapping[str, PathId] = {
    "agent_id": PathId("agent", AGENT_ID),
    "run_id": PathId("run", r"[A-Za-z0-9_-]{1,64}"),
    "batch_id": PathId("batch", r"[A-Za-z0-9_-]{1,64}"),
    "session_id": PathId("session", SESSION_ID),
    "token": PathId("share link", TOKEN),
    "memory_id": PathId("memory", r"[A-Za-z0-9._:-]{1,100}"),
}


class Call(msgspec.Struct, Generic[BodyT, QueryT], frozen=True):
    """One request on its way to its handler: who asks, and what was asked, read and checked."""

    services: Services
    caller: Principal
    ids: Mapping[str, str]
    body: BodyT
    query: QueryT
    request: Asked


@dataclass(frozen=True)
class Reply:
    """An answer's ``data`` with headers of its own."""

    data: Any
    headers: Mapping[str, str] = field(default_factory=dict)


Handler: TypeAlias = Callable[[Call[Any, Any]], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class Route:
    """One method of one path: the server serves it and the API's description describes it from this alone.

    Attributes:
        path: with ids as ``{agent_id}``, each one of ``PATH_IDS``.
        aliases: older paths that are served too.
        body: the type of the JSON body; None reads none.
        body_media_types: under which content types the body may come.
        query: the type of the query string, in which nothing else may stand; None allows none.
        raw_query: the handler reads the values in the query itself; ``query`` describes them.
        answer: the type of ``data``; None for an answer without content.
        status: of the answer when all went well.
        answer_json: the type of an answer of ``STREAM`` to who accepts JSON rather; it is not wrapped.
        frames: of an answer of ``STREAM``: a run's events, or a batch's.
        also: other good statuses, with what they mean.
        refusals: statuses that the handler may refuse with, beside those that every such route may.
        headers: request headers that the handler reads, with what they are for.
        answer_headers: headers of the good answer, with what they say.
        example: of the body.
        open: needs no key.
        direct: plain requests are answered on their connection, past Quart: for the route that has to be quick.
        wrapped: whether the answer stands in ``{"success": true, "data": ...}``.
    """

    method: Method
    path: str
    handler: Handler
    summary: str
    tag: str
    aliases: tuple[str, ...] = ()
    body: Any = None
    body_media_types: tuple[str, ...] = (JSON_MEDIA_TYPE,)
    query: type[msgspec.Struct] | None = None
    raw_query: bool = False
    answer: Any = None
    answer_json: Any = None
    frames: Literal["Event", "BatchEvent"] = "Event"
    status: int = 200
    also: Mapping[int, str] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    example: Any = None
    open: bool = False
    direct: bool = False
    wrapped: bool = True

    @property
    def name(self) -> str:
        """The route's name: its handler's."""
        return self.handler.__name__

    @property
    def path_ids(self) -> tuple[str, ...]:
        """The names of the ids in the path, in order."""
        return tuple(_ID_IN_PATH.findall(self.path))


def install_routes(app: QuartTrio, services: Services, routes: Sequence[Route]) -> None:
    """Serve the routes. ``HEAD`` and ``OPTIONS`` come with them."""
    for route in routes:
        view = _view(route, services)
        for number, path in enumerate((route.path, *route.aliases)):
            app.add_url_rule(
                _ID_IN_PATH.sub(r"<\1>", path),
                endpoint=f"{route.name}.{number}",
                view_func=view,
                methods=[route.method],
            )


def direct_routes(services: Services, routes: Sequence[Route]) -> DirectRoutes:
    """The routes that connections serve themselves, with what stands before and behind every route of the app's."""
    found = []
    for route in routes:
        if route.direct:
            respond = _guarded(partial(_answer, route, services), services.guard)
            found += [DirectRoute(_path_pattern(path), respond) for path in (route.path, *route.aliases)]
    return DirectRoutes(found)


def _path_pattern(path: str) -> re.Pattern[bytes]:
    """Ids as they can be, and none of their characters in a percent's disguise."""
    text = _ID_IN_PATH.sub(lambda name: f"(?P<{name[1]}>{PATH_IDS[name[1]].pattern})", path)
    return re.compile(text.encode())


def _guarded(respond: Respond, guard: RequestGuard | None) -> Respond:
    async def guarded(asked: Asked, ids: Mapping[str, str]) -> Response | EventStreamBody:
        answer: Response | EventStreamBody
        try:
            if guard is not None:
                await guard.check(asked)
            answer = await respond(asked, ids)
        except Exception as error:  # noqa: BLE001 - a bug's answer too
            answer = await answer_error(error)
        if guard is not None:
            guard.cors.mark(asked, answer)
        return answer

    return guarded


def _view(route: Route, services: Services) -> Callable[..., Awaitable[Response]]:
    async def view(**ids: str) -> Response:
        answer = await _answer(route, services, request, ids)
        return stream_response(answer, headers=answer.headers) if isinstance(answer, EventStreamBody) else answer

    return view


async def _answer(route: Route, services: Services, asked: Asked, ids: Mapping[str, str]) -> Response | EventStreamBody:
    caller = await _admitted(route, services, asked)
    for name, text in ids.items():
        if not PATH_IDS[name].fits(text):
            raise not_found(PATH_IDS[name].what, text)
    if route.raw_query:
        check_parameters(asked, route.query)
    query = None if route.raw_query else read_query(asked, route.query)
    body = None if route.body is None else await read_json(asked, route.body, route.body_media_types)
    answer = await route.handler(Call(services, caller, ids, body, query, asked))
    body_sent = answer.response if isinstance(answer, Response) else answer
    if isinstance(body_sent, WatchedBody) and services.gatekeeper and not route.open:
        body_sent.watch = KeyWatch(services.gatekeeper, caller)
    return answer if isinstance(answer, Response | EventStreamBody) else _response(route, answer)


async def _admitted(route: Route, services: Services, asked: Asked) -> Principal:
    if route.open or services.gatekeeper is None:
        return LOCAL_USER
    caller = await services.gatekeeper.admit(asked)
    if caller.key_id is not None:
        structlog.contextvars.bind_contextvars(key_id=caller.key_id)  # its task's lines, and those of its runs, say it
    return caller


def _response(route: Route, answer: Any) -> Response:
    reply = answer if isinstance(answer, Reply) else Reply(answer)
    if route.answer is None:
        return Response(b"", status=route.status, headers={"Cache-Control": "no-store", **reply.headers})
    data = {"success": True, "data": reply.data} if route.wrapped else reply.data
    return json_response(data, route.status, reply.headers)


def check_parameters(request: Asked | Websocket, kind: type[msgspec.Struct] | None) -> None:
    """Whether the query has none but the type's parameters. Raises ApiError: 422."""
    known = () if kind is None else kind.__struct_encode_fields__
    for name in request.args:
        if name not in known:
            shown = name[:100]
            raise ApiError(422, "VALIDATION_ERROR", f"there is no parameter {shown!r}", {"field": shown})


def read_query(request: Asked | Websocket, kind: type[msgspec.Struct] | None) -> Any:
    """The query string as that type; None is one without parameters.

    Raises:
        ApiError: 422 for a parameter that is unknown, there twice, or has no such value.
    """
    check_parameters(request, kind)
    parameters = request.args.to_dict(flat=False)
    for name, values in parameters.items():
        if len(values) > 1:
            raise ApiError(422, "VALIDATION_ERROR", f"the parameter {name!r} is there twice", {"field": name})
    if kind is None:
        return None
    try:
        return msgspec.convert({name: values[0] for name, values in parameters.items()}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ApiError(422, "VALIDATION_ERROR", f"in the query: {error}") from error
