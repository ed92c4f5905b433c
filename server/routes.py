"""The route table: all that this server serves. The API's description is made from it, and so are its tests."""

from __future__ import annotations

from functools import cache
from typing import Any

from quart import Response, request

from . import api_agents, api_batch, api_caller, api_chat, api_health, api_history, api_memory, api_runs, api_shares
from .docs_page import HEADERS, render
from .errors import json_response
from .openapi import describe
from .routing import Call, Reply, Route, Special


@cache
def description(keyed: bool) -> dict[str, Any]:
    """The OpenAPI document of all routes, of a server with keys or of one without."""
    return describe(ROUTES, keyed=keyed)


async def get_openapi(call: Call[None, None]) -> Response:
    """The API's description."""
    return json_response(description(await _is_keyed(call)), headers={"Cache-Control": "no-cache"})


async def get_docs(call: Call[None, None]) -> Response:
    """The API's description as a page."""
    page = render(description(await _is_keyed(call)), request.host_url.rstrip("/"))
    return Response(page, content_type="text/html; charset=utf-8", headers=HEADERS)


async def show_docs(_: Call[None, None]) -> Reply:
    """The way to the page, for who has only the server's address."""
    return Reply(None, {"Location": "/docs"})


async def _is_keyed(call: Call[None, None]) -> bool:
    gatekeeper = call.services.gatekeeper
    return gatekeeper is not None and await gatekeeper.is_keyed()


ROUTES: tuple[Route, ...] = (
    *api_chat.ROUTES,
    *api_runs.ROUTES,
    *api_shares.ROUTES,
    *api_batch.ROUTES,
    *api_agents.ROUTES,
    *api_history.ROUTES,
    *api_memory.ROUTES,
    *api_caller.ROUTES,
    *api_health.ROUTES,
    Route(
        method="GET",
        path="/",
        handler=show_docs,
        summary="The way to this description's page",
        tag="Server",
        status=302,
        answer_headers={"Location": "Where the page is."},
        open=True,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        handler=get_openapi,
        summary="This description, OpenAPI 3.1",
        tag="Server",
        answer=Special.DOCUMENT,
        refusals=(503,),
        open=True,
    ),
    Route(
        method="GET",
        path="/docs",
        handler=get_docs,
        summary="This description, as a page",
        tag="Server",
        answer=Special.PAGE,
        refusals=(503,),
        open=True,
    ),
)
