"""What a request says of an earlier copy of it: by ``Last-Event-ID``, or by ``Idempotency-Key``."""

from __future__ import annotations

from typing import Any

import msgspec

from .asked import Asked
from .idempotency import Keyed, Place, check_fingerprint, fingerprint_of, requested_key
from .routing import PATH_IDS, Call
from .sse import bad_cursor, sequence_number
from .store.rows import Scope


class ResumeQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From where on a repeated request reads on.

    Attributes:
        after: the number of the last event that the client has; goes with ``Idempotency-Key`` or ``Last-Event-ID``.
    """

    after: int = 0


class Repeat(msgspec.Struct, frozen=True):
    """What a request repeats, if anything.

    Attributes:
        resumed_id: whose event the client has, if it names one: that is read on, and nothing is started.
        place: where its key is kept, if it has one.
        after: whether the client has events already; there must be something then that it has them of.
    """

    resumed_id: str | None
    place: Place | None
    after: bool


async def repeat_of(call: Call[Any, Any], agent_id: str, kind: Keyed) -> Repeat:
    """What the request repeats. Keys are the caller's own, for one ``agent_id``.

    Raises:
        ApiError: 400 for a header that cannot be, or two that do not go together; 422, the key stands for another
            request; 503, it cannot be told for which.
    """
    afters = [sequence_number(text) for text in call.request.args.getlist("after")]
    key = requested_key(call.request)
    place = None if key is None else place_of(call, agent_id, key)
    resumed_id = _resumed_id(call.request, kind.what)
    claim = None if place is None else await call.services.idempotency.find(place)
    if claim is not None:
        check_fingerprint(claim, fingerprint_of(call.body), kind)
        if resumed_id not in (None, claim.run_id):
            raise bad_cursor(f"Last-Event-ID is of another {kind.what} than the Idempotency-Key")
    return Repeat(resumed_id, place, any(afters))


def place_of(call: Call[Any, Any], agent_id: str, key: str) -> Place:
    """Where that key of the caller's is kept."""
    return Scope(call.caller.tenant_id, call.caller.user_id, agent_id), key


def check_nothing_read(what: str, after: bool) -> None:
    """Refuse to start something of which the client has events already.

    Raises:
        ApiError: 400.
    """
    if after:
        raise bad_cursor(f"there is no {what} yet after whose events to read")


def _resumed_id(request: Asked, what: str) -> str | None:
    event_ids = request.headers.getlist("Last-Event-ID")
    if not any(event_ids):
        return None
    resumed_id, *others = {event_id.rpartition(".")[0] for event_id in event_ids if event_id}
    if others or not PATH_IDS[f"{what}_id"].fits(resumed_id):
        raise bad_cursor("Last-Event-ID is no event's id")
    return resumed_id
