"""The API's description, OpenAPI 3.1, made from the route table and the types: there is no second one to keep true."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import msgspec

from engine import Error, Event

from .batch_log import BatchComplete, BatchRefusal, BatchStarted
from .errors import Refusal
from .routing import PATH_IDS, STREAM, Route, Special

SUMMARY = "Streams what an LLM agent says, token by token, the moment the model says it."
DESCRIPTION = (
    "JSON in, JSON or server-sent events out. On a server with API keys every request but those for its health and "
    "this description needs one; a server without keys is for one user on its own machine and needs none."
)

STATUSES: Mapping[int, str] = {
    400: "The request is malformed: no JSON, a cursor that is none, a Host that is not this server's.",
    401: "There is no API key in the request, or none that is known.",
    403: "The key may not do this; or a web page from elsewhere asks.",
    404: "There is no such thing, or it is not yours.",
    406: "The answer comes in none of the types that Accept names.",
    408: "The body did not come in time.",
    409: "It is there already, or cannot be changed; or the run has not ended.",
    410: "It was there, and is gone.",
    412: "It was changed in between: the revision is not the one that If-Match names.",
    413: "The body, or a part of it, is too large.",
    415: "The body has another content type.",
    421: "The Host is not one of this server's.",
    422: "The body or the query has another shape; `message` and `details` name the field.",
    429: "The key has used up what it may; `Retry-After` says when to come again.",
    500: "A bug of ours.",
    503: "The server shuts down, its store does not answer, or the run failed (then `code` is the run's).",
}

SECURITY: Mapping[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer lumos_...`"},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "`X-API-Key: lumos_...`"},
}

_REFERENCE = "#/components/schemas/{name}"
_BATCH_EVENT = {
    "description": (
        "`batch_start` first, then what was not started, then the runs' events, each with its `run_id`, and last "
        "`batch_done`; or, when the batch's worker died, an `error` of no run."
    ),
    "anyOf": [
        *({"$ref": _REFERENCE.format(name=kind.__name__)} for kind in (BatchStarted, BatchRefusal, BatchComplete)),
        {
            "allOf": [{"$ref": _REFERENCE.format(name="Event")}],
            "type": "object",
            "properties": {"run_id": {"type": "string"}},
            "required": ["run_id"],
        },
        {
            "allOf": [{"$ref": _REFERENCE.format(name=Error.__name__)}],
            "type": "object",
            "properties": {"code": {"const": "worker_lost"}},
        },
    ],
}
_CODE = re.compile("``")
_ATTRIBUTE = re.compile(r"^(\w+(?:, \w+)*): (.+)$")


def refusals(route: Route) -> tuple[int, ...]:
    """The statuses that the route may refuse a request with."""
    statuses = {400, 403, 421, 422, 500, *route.refusals}  # 422: any may come with a parameter that there is not
    if not route.open:
        statuses |= {401, 429, 503}
    if route.path_ids:
        statuses.add(404)
    if route.body is not None:
        statuses |= {408, 413, 415}
    return tuple(sorted(statuses))


def describe(routes: Sequence[Route], *, keyed: bool = True) -> dict[str, Any]:
    """The OpenAPI document of the routes, ready for JSON, as a server with keys serves them, or one without."""
    schemas, components = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for path in (route.path, *route.aliases):
            operation = _operation(route, schemas, alias=path != route.path)
            paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Lumos", "version": version("lumos-stream"), "summary": SUMMARY, "description": DESCRIPTION},
        "servers": [{"url": "/"}],
        "security": [*({name: []} for name in SECURITY), *([] if keyed else [{}])],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": dict(SECURITY),
            "responses": {_response_name(status): _refusal_response(status) for status in STATUSES},
        },
    }


@cache
def _key(kind: Any) -> str:
    return repr(kind)


def _schemas(routes: Sequence[Route]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schemas of all types, by ``_key``, and the components that they refer to."""
    kinds = [Refusal, Event, BatchStarted, BatchRefusal, BatchComplete]
    for route in routes:
        kinds += [kind for kind in (route.body, route.query, route.answer, route.answer_json) if _is_described(kind)]
    distinct = list({_key(kind): kind for kind in kinds}.values())
    schemas, components = msgspec.json.schema_components(distinct, ref_template=_REFERENCE)
    for component in components.values():
        _document(component)
    by_key = {_key(kind): schema for kind, schema in zip(distinct, schemas, strict=True)}
    return by_key, {"Event": by_key[_key(Event)], "BatchEvent": _BATCH_EVENT, **components}


def _is_described(kind: Any) -> bool:
    return kind is not None and not isinstance(kind, Special)


def _document(component: dict[str, Any]) -> None:
    """Take the docstring apart: what it says of a field becomes the description of that property."""
    text, _, attributes = component.get("description", "").partition("Attributes:")
    if not text.strip():
        component.pop("description", None)
        return
    component["description"] = _markdown(text)
    properties = component.get("properties", {})
    for names, description in _attribute_lines(attributes):
        for name in names:
            if name in properties:
                properties[name]["description"] = _markdown(description)


def _attribute_lines(attributes: str) -> list[tuple[list[str], str]]:
    found: list[tuple[list[str], str]] = []
    for line in (line.strip() for line in attributes.splitlines()):
        match = _ATTRIBUTE.match(line)
        if match is not None:
            found.append((match[1].split(", "), match[2]))
        elif line and found:
            names, text = found.pop()
            found.append((names, f"{text} {line}"))
    return found


def _markdown(text: str) -> str:
    return _CODE.sub("`", " ".join(text.split()))


def _operation(route: Route, schemas: Mapping[str, Any], *, alias: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.name}_alias" if alias else route.name,
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": _parameters(route),
        "responses": _responses(route, schemas),
    }
    if alias:
        operation["deprecated"] = True
    if route.open:
        operation["security"] = []
    if route.body is not None:
        content = {"schema": schemas[_key(route.body)]}
        if route.example is not None:
            content["example"] = route.example
        operation["requestBody"] = {
            "required": True,
            "content": dict.fromkeys(route.body_media_types, content),
        }
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": f"^{PATH_IDS[name].pattern}$"},
        }
        for name in route.path_ids
    ]
    if route.query is not None:
        parameters += _query_parameters(route.query)
    parameters += [
        {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
        for name, text in route.headers.items()
    ]
    return parameters


def _query_parameters(kind: type[msgspec.Struct]) -> list[dict[str, Any]]:
    (schema,), components = msgspec.json.schema_components([kind], ref_template=_REFERENCE)
    component = components[schema["$ref"].rpartition("/")[2]]
    _document(component)
    parameters = []
    for name, described in component["properties"].items():
        text = described.pop("description", None)
        parameter = {
            "name": name,
            "in": "query",
            "required": name in component["required"],
            "schema": _given(described),
        }
        parameters.append(parameter if text is None else parameter | {"description": text})
    return parameters


def _given(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter's schema without ``null``: that is one which is not there."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    return kinds[0] if len(kinds) == 1 else schema


def _responses(route: Route, schemas: Mapping[str, Any]) -> dict[str, Any]:
    responses = {str(route.status): _good_response(route, schemas)}
    for status, text in route.also.items():
        responses[str(status)] = {"description": text}
    for status in refusals(route):
        responses[str(status)] = {"$ref": f"#/components/responses/{_response_name(status)}"}
    return responses


def _good_response(route: Route, schemas: Mapping[str, Any]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": HTTPStatus(route.status).phrase}
    if route.answer_headers:
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in route.answer_headers.items()
        }
    if route.answer is STREAM:
        response["description"] = "Server-sent events; the schema is that of one."
        response["content"] = {STREAM.value: {"schema": _sse_frame(route)}}
        if route.answer_json is not None:
            response["content"]["application/json"] = {"schema": schemas[_key(route.answer_json)]}
    elif route.answer is Special.PAGE:
        response["content"] = {Special.PAGE.value: {"schema": {"type": "string"}}}
    elif route.answer is Special.DOCUMENT:
        response["content"] = {Special.DOCUMENT.value: {"schema": {"type": "object"}}}
    elif route.answer is not None:
        schema = schemas[_key(route.answer)]
        response["content"] = {"application/json": {"schema": _wrapped(schema) if route.wrapped else schema}}
    return response


def _sse_frame(route: Route) -> dict[str, Any]:
    source = "run_id" if route.frames == "Event" else "batch_id"
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string", "description": f"`{{{source}}}.{{seq}}`"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"$ref": _REFERENCE.format(name=route.frames)},
            },
        },
        "required": ["data"],
    }


def _wrapped(schema: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"success": {"const": True}, "data": schema},
        "required": ["success", "data"],
        "additionalProperties": False,
    }


def _response_name(status: int) -> str:
    return HTTPStatus(status).phrase.replace(" ", "").replace("-", "")


def _refusal_response(status: int) -> dict[str, Any]:
    example = {
        "code": HTTPStatus(status).name,
        "message": STATUSES[status].partition(":")[0],
        "details": None,
        "timestamp": "2026-11-22T20:50:20.307488+00:00",
    }
    response: dict[str, Any] = {
        "description": STATUSES[status],
        "content": {
            "application/json": {"schema": {"$ref": _REFERENCE.format(name=Refusal.__name__)}, "example": example}
        },
    }
    if status in (429, 503):
        response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
    return response
