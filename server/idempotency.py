"""``Idempotency-Key``: a request that is repeated joins the run, or the batch, that its first copy started.

After draft-ietf-httpapi-idempotency-key-header-07: the same key with another body is 422, one whose first request is
just being dealt with by another process is 409, one that cannot be a key is 400. A key is the caller's own, for one
agent or for batches, and is kept for as long as its run can be read. The draft's header is a quoted string, and clients
send bare ones: it is taken as it comes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import TypeAlias, TypeVar

import msgspec
import structlog
import trio

from .asked import Asked
from .availability import or_unavailable
from .errors import ApiError
from .run_directory import GoneError
from .store.database import Database
from .store.errors import StoreUnavailableError
from .store.idempotency import KeyClaim, claim_key, find_claim, release_key
from .store.rows import Scope
from .store.times import time_text

KEY = r"[\x21-\x7e]{1,255}"
STARTING_SECONDS = 60.0
"""After this, a key whose run is nowhere is free again: the process that was to start it died in between."""

RELEASE_SECONDS = 2.0
MEMORY_KEYS = 10_000
"""How many keys a server without database keeps."""

Place: TypeAlias = tuple[Scope, str]
T = TypeVar("T")

_logger = structlog.get_logger("lumos")


class Keyed(msgspec.Struct, frozen=True):
    """What keys stand for.

    Attributes:
        what: its name; details call its id ``{what}_id``.
        renewed: whether a key is free again once nobody has any more what it stands for; else it is 410 from then on.
    """

    what: str
    renewed: bool


RUN = Keyed("run", renewed=True)


def requested_key(request: Asked) -> str | None:
    """The request's key.

    Raises:
        ApiError: 400, it cannot be one, or there are two.
    """
    keys = set(request.headers.getlist("Idempotency-Key"))
    if not keys:
        return None
    key = keys.pop()
    if keys or not re.fullmatch(KEY, key):
        message = "Idempotency-Key is one text of 1 to 255 visible ASCII characters"
        raise ApiError(400, "INVALID_IDEMPOTENCY_KEY", message)
    return key


def fingerprint_of(body: msgspec.Struct) -> bytes:
    """What a repeated request must have in common with its first copy, whatever the order of its fields."""
    return hashlib.sha256(msgspec.json.encode(body, order="deterministic")).digest()


class IdempotencyKeys:
    """Which keys stand for which runs: in the store, or without one in this process."""

    def __init__(self, database: Database | None, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self._claims: dict[Place, KeyClaim] = {}
        self._turns: dict[Place, _Turn] = {}

    async def find(self, place: Place) -> KeyClaim | None:
        """What the key stands for. Raises ApiError: 503."""
        if self._database is None:
            return self._claims.get(place)
        return await or_unavailable(self._database.read, find_claim, *place)

    async def join_or_start(
        self,
        place: Place,
        fingerprint: bytes,
        new_run_id: str,
        find: Callable[[str], Awaitable[T | None]],
        start: Callable[[str], Awaitable[T]],
        kind: Keyed = RUN,
    ) -> T:
        """The run that the key stands for; without one that can be read, a new one of that id, started by ``start``.

        Requests of this process take turns, so that the second finds what the first has started.

        Raises:
            ApiError: 422, the key stands for another request; 409, another process is just starting the run; 410, what
                it stands for is gone and not to be renewed; what ``find`` and ``start`` raise, and after ``start`` the
                key stands for nothing.
        """
        async with self._turn(place):
            claim = await self.find(place)
            if claim is not None:
                check_fingerprint(claim, fingerprint, kind)
                run = await self._find_run(claim, find, kind)
                if run is not None:
                    return run
            mine = KeyClaim(new_run_id, fingerprint, self._now())
            if not await self._claim(place, mine, claim):
                raise _being_started()
            try:
                return await start(new_run_id)
            except BaseException:
                with trio.move_on_after(RELEASE_SECONDS, shield=True):
                    await self._release(place, new_run_id)
                raise

    async def _find_run(self, claim: KeyClaim, find: Callable[[str], Awaitable[T | None]], kind: Keyed) -> T | None:
        """The claim's run; None if nobody can read it any more, and the key is free."""
        try:
            run = await find(claim.run_id)
        except GoneError:
            return None
        if run is None and self._database is not None and self._is_young(claim):
            raise _being_started()
        if run is None and not kind.renewed:
            message = f"the {kind.what} of this Idempotency-Key is not kept any more"
            raise ApiError(410, "GONE", message, {f"{kind.what}_id": claim.run_id})
        return run

    async def _claim(self, place: Place, mine: KeyClaim, before: KeyClaim | None) -> bool:
        if self._database is None:
            self._claims.pop(place, None)
            self._claims[place] = mine
            while len(self._claims) > MEMORY_KEYS:
                del self._claims[next(iter(self._claims))]
            return True
        instead_of = None if before is None else before.run_id
        return await or_unavailable(self._database.write, claim_key, *place, mine, instead_of)

    async def _release(self, place: Place, run_id: str) -> None:
        if self._database is None:
            self._claims.pop(place, None)
            return
        try:
            await self._database.write(release_key, *place, run_id)
        except StoreUnavailableError as error:
            _logger.warning("idempotency.not_released", run_id=run_id, reason=str(error))

    def _is_young(self, claim: KeyClaim) -> bool:
        """Whether the claim's run may be just about to start."""
        oldest = self._clock() - timedelta(seconds=STARTING_SECONDS)
        return claim.created_at > time_text(oldest)

    @asynccontextmanager
    async def _turn(self, place: Place) -> AsyncIterator[None]:
        turn = self._turns.setdefault(place, _Turn())
        turn.wanted += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted -= 1
            if not turn.wanted:
                del self._turns[place]

    def _now(self) -> str:
        return time_text(self._clock())


class _Turn:
    """Whose turn it is with one key, and how many want it."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.wanted = 0


def check_fingerprint(claim: KeyClaim, fingerprint: bytes, kind: Keyed = RUN) -> None:
    """Refuse a key that was sent with another body."""
    if claim.fingerprint != fingerprint:
        message = "the Idempotency-Key was sent before, with another body"
        raise ApiError(422, "IDEMPOTENCY_KEY_REUSED", message, {f"{kind.what}_id": claim.run_id})


def _being_started() -> ApiError:
    message = "the first request with this Idempotency-Key is just being dealt with"
    return ApiError(409, "CONFLICT", message, headers={"Retry-After": "1"})
