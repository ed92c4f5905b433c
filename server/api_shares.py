"""Share links: their owner makes them; who has one reads the run's events without a key."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from quart import Response, request

from .edge import RangeView, bearers_of_a_link, check_range, range_response
from .errors import ApiError, not_found
from .routing import API, STREAM, Call, Route
from .run_access import find_run, unavailable
from .run_directory import ElsewhereError, GoneError, RunHandle, SourceUnavailableError

DAY_SECONDS = 86_400

EventNumber = Annotated[int, Meta(ge=0, lt=10**12)]


class ShareRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A wish for a link.

    Attributes:
        expires_in: seconds that the link is good for; an hour unless told, 30 days at most.
    """

    expires_in: Annotated[int, Meta(ge=1, le=30 * DAY_SECONDS)] = 3600


class ShareView(msgspec.Struct, frozen=True):
    """A link to a run's events.

    Attributes:
        url: the path to read, once the run has ended.
        expires_at: UTC, ISO 8601.
    """

    url: str
    token: str
    expires_at: str


class SharedQuery(msgspec.Struct, frozen=True):
    """Which of the events: numbers in ``after`` < n <= ``until``; without ``until``, to the run's end."""

    after: EventNumber = 0
    until: EventNumber | None = None


async def share_run(call: Call[ShareRequest, None]) -> ShareView:
    """Make a link to the run's events. Nobody but the one whose run it is may."""
    run = await find_run(call)
    if run.owner.user_id != call.caller.user_id:
        raise ApiError(403, "FORBIDDEN", "a run is its owner's to share")
    links = call.services.share_links
    if links is None:
        raise unavailable("this server makes no share links")
    token, expires_at = links.make(run.run_id, call.body.expires_in)
    return ShareView(f"{API}/shared/{token}/events", token, expires_at.isoformat())


async def get_shared_events(call: Call[None, SharedQuery]) -> Response:
    """The events of an ended run for whoever has the link: without metadata, usage and what was remembered."""
    links = call.services.share_links
    shared = None if links is None else links.open(call.ids["token"])
    if shared is None:
        raise not_found("share link", call.ids["token"])
    if shared.seconds_left <= 0:
        raise ApiError(410, "GONE", "this link has expired")
    run = await _find_shared(call, shared.run_id)
    until = run.log.last_seq if call.query.until is None else call.query.until
    check_range(run.log, call.query.after, until)
    audience = bearers_of_a_link(shared.expires_at)
    return await range_response(request, run.log, call.query.after, until, audience, call.services.database)


async def _find_shared(call: Call[None, SharedQuery], run_id: str) -> RunHandle:
    """The run of a good link, whoever asks."""
    try:
        run = await call.services.runs.find(run_id)
    except GoneError as gone:
        raise ApiError(410, "GONE", "the run's events are no longer kept") from gone
    except (ElsewhereError, SourceUnavailableError) as error:
        raise unavailable("the run's events cannot be read now") from error
    if run is None:
        raise not_found("share link", call.ids["token"])
    return run


ROUTES = (
    Route(
        method="POST",
        path=f"{API}/runs/{{run_id}}/share",
        handler=share_run,
        summary="Make a link with which anybody can read a run's events for a time",
        tag="Runs",
        body=ShareRequest,
        answer=ShareView,
        refusals=(403, 410, 503),
        example={"expires_in": 3600},
    ),
    Route(
        method="GET",
        path=f"{API}/shared/{{token}}/events",
        handler=get_shared_events,
        summary="A shared run's events, for anybody who has the link",
        tag="Runs",
        query=SharedQuery,
        answer=STREAM,
        answer_json=RangeView,
        also={304: "You have them."},
        headers={"If-None-Match": "The ETag of what you have."},
        refusals=(400, 406, 409, 410, 503),
        open=True,
    ),
)
