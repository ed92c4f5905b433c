"""The gatekeeper: from a request's API key to who asks, or to a refusal that tells nothing."""

from __future__ import annotations

from math import inf
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

import trio
from quart.wrappers.base import BaseRequestWebsocket
from werkzeug.datastructures import Headers

from .asked import Asked, PlainHeaders
from .availability import ReadableStore, or_unavailable
from .errors import ApiError
from .keys import PresentedKey, hash_secret, parse_key
from .limits import KeyLimiter, RunSlot
from .principal import LOCAL_USER, Principal, is_name
from .store import keys as key_rows
from .store.rows import StoredKey

KEY_SECONDS = 5.0
"""How long what the store says of a key counts: a revoked one is refused after that, at the latest."""

UNKNOWN_KEY_SECONDS = 1.0
MAX_CACHED_KEYS = 10_000
"""Of keys that there are, and again as many of ids that there are not."""

_NO_HASH = hash_secret("")

V = TypeVar("V")


class Gatekeeper:
    """Says who asks. One per app; shared by all its requests.

    Without any key in the store everybody is ``LOCAL_USER``. The store is asked for a first key every ``KEY_SECONDS``;
    once there was one, the process never serves without keys again.
    """

    def __init__(self, store: ReadableStore, limiter: KeyLimiter | None = None, *, keyed: bool = False) -> None:
        """``keyed`` is whether there were keys when the address to listen on was chosen by that."""
        self._store = store
        self.limiter = limiter or KeyLimiter(store)
        self._keyed = keyed
        self._look_again_at = -inf
        self._looking = trio.Lock()
        self._known: _Shelf[StoredKey] = _Shelf(KEY_SECONDS)
        self._unknown: _Shelf[None] = _Shelf(UNKNOWN_KEY_SECONDS)
        self._asking: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()

    async def admit(self, request: Asked | BaseRequestWebsocket, *further: str) -> Principal:
        """Who asks, by ``Authorization: Bearer`` or ``X-API-Key``. Counts the request towards the key's limit.

        ``further`` are keys that the request shows in another way; all have to be the same.

        Raises:
            ApiError: 400 for keys that differ, 401 for none or one that does not count, 429 for too many requests, 503
                while the store does not answer.
        """
        principal = await self._identify(presented_text(request.headers, *further))
        self.limiter.count_request(principal)
        return principal

    async def is_keyed(self) -> bool:
        """Whether requests need a key. As long as they do not, this asks the store again every ``KEY_SECONDS``.

        Raises:
            ApiError: 503 while the store does not answer.
        """
        if not self._keyed and trio.current_time() >= self._look_again_at:
            await or_unavailable(self._look_for_keys)
        return self._keyed

    async def counts_until(self, principal: Principal) -> float:
        """Until when, on trio's clock, nobody has to ask again whether the caller is let in; -inf if he is not.

        Raises:
            ApiError: 503 while the store does not answer.
        """
        if not await self._still_counts(principal.key_id):
            return -inf
        return self.let_in_until(principal)

    def let_in_until(self, principal: Principal) -> float:
        """As ``counts_until`` for who was let in just now, without asking."""
        return self._look_again_at if principal.key_id is None else self._known.good_until(principal.key_id)

    async def wait_revoked(self, principal: Principal) -> None:
        """Until the key no longer counts, ``KEY_SECONDS`` later at most; without a key, until one is needed.

        The store is asked when what it said is too old, once for all who wait. While it does not answer, nothing ends.
        """
        while True:
            try:
                good_until = await self.counts_until(principal)
                if good_until == -inf:
                    return
                await trio.sleep_until(good_until)
            except ApiError:
                await trio.sleep(UNKNOWN_KEY_SECONDS)

    async def _still_counts(self, key_id: str | None) -> bool:
        if key_id is None:
            return not await self.is_keyed()
        key = await self._find(key_id)
        return key is not None and key.revoked_at is None

    async def open_run(self, principal: Principal) -> RunSlot:
        """Take the place of one run, the caller's to close or to hand to its run, see ``RunSlot``.

        Raises:
            ApiError: 429 for too many runs at once or the day's tokens used up, 503 while the store does not answer.
        """
        await self.limiter.check_tokens(principal)
        return self.limiter.run_slot(principal)

    async def _identify(self, text: str | None) -> Principal:
        presented = parse_key(text) if text else None
        if presented is not None:
            return await self._owner_of(presented)
        ours = text is not None and text.startswith("lumos_")  # mistyped: better said than taken for the local user
        if ours or await self.is_keyed():
            raise _unauthorized()
        return LOCAL_USER

    async def _owner_of(self, presented: PresentedKey) -> Principal:
        """Whose key it is. The same comparison is made whether the key id is known or not."""
        key = await self._find(presented.key_id)
        opened = presented.opens(_NO_HASH if key is None else key.secret_hash)
        if key is None or not opened or key.revoked_at is not None:
            raise _unauthorized()
        self._keyed = True
        return Principal(
            tenant_id=key.tenant_id, user_id=key.user_id, admin=key.admin, key_id=key.key_id, limits=key.limits
        )

    async def _find(self, key_id: str) -> StoredKey | None:
        key = self._known.get(key_id)
        if key is not None or key_id in self._unknown:
            return key
        return await or_unavailable(self._look_up, key_id)

    async def _look_up(self, key_id: str) -> StoredKey | None:
        """Ask the store; of many requests with one key, only one does."""
        lock = self._asking.setdefault(key_id, trio.Lock())
        async with lock:
            key = self._known.get(key_id)
            if key is not None or key_id in self._unknown:
                return key
            asked_at = trio.current_time()
            key = await self._store.read(key_rows.find_key, key_id)
            if key is None:
                self._unknown.put(key_id, None, asked_at)
            else:
                self._known.put(key_id, key, asked_at)
            return key

    async def _look_for_keys(self) -> None:
        async with self._looking:
            asked_at = trio.current_time()
            if not self._keyed and asked_at >= self._look_again_at:
                if await self._store.read(key_rows.any_keys):
                    self._keyed = True
                self._look_again_at = asked_at + KEY_SECONDS


class _Shelf(Generic[V]):
    """Values by key id for some seconds from when they were asked for; the oldest make room."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: dict[str, tuple[V, float]] = {}

    def __contains__(self, key_id: str) -> bool:
        return trio.current_time() < self.good_until(key_id)

    def get(self, key_id: str) -> V | None:
        """The value, unless it is too old."""
        value = self._values.get(key_id)
        return value[0] if value is not None and trio.current_time() < value[1] else None

    def good_until(self, key_id: str) -> float:
        """When the value has to be asked for again, on trio's clock; at once if there is none."""
        value = self._values.get(key_id)
        return -inf if value is None else value[1]

    def put(self, key_id: str, value: V, asked_at: float) -> None:
        """Keep the value."""
        self._values.pop(key_id, None)  # the order is that of age
        if len(self._values) >= MAX_CACHED_KEYS:
            del self._values[next(iter(self._values))]
        self._values[key_id] = (value, asked_at + self._seconds)


def presented_text(headers: Headers | PlainHeaders, *further: str) -> str | None:
    """What the request shows as its key; None without any. Keys in the query string do not count: URLs get logged.

    Raises:
        ApiError: 400 for several that differ.
    """
    found = None
    for shown in (*headers.getlist("X-API-Key"), *map(_bearer, headers.getlist("Authorization")), *further):
        text = shown.strip()
        if text and found not in (None, text):
            raise ApiError(400, "AMBIGUOUS_KEY", "the request has several API keys, and they differ")
        found = text or found
    return found


def _bearer(credentials: str) -> str:
    """The key in it; "" for another scheme: that is a proxy's in front of us."""
    scheme, _, text = credentials.strip().partition(" ")
    return text if scheme.lower() == "bearer" else ""


def resolve_user(principal: Principal, wished: str | None) -> str:
    """For which user of the tenant a request is: the asker, or whom an admin names.

    Raises:
        ApiError: 422 for what cannot be a user's name, 403 for somebody else's.
    """
    if wished is None or wished == principal.user_id:
        return principal.user_id
    if not is_name(wished):
        raise ApiError(
            422, "VALIDATION_ERROR", "user_id is not 1 to 200 letters, digits and @ . _ : + -", {"field": "user_id"}
        )
    if not principal.admin:
        raise ApiError(403, "FORBIDDEN", "user_id is not yours; only an admin may name another", {"field": "user_id"})
    return wished


def _unauthorized() -> ApiError:
    """One answer for every key that does not count: which part was wrong is nobody's business."""
    message = "this needs a valid API key, as Authorization: Bearer or X-API-Key"
    return ApiError(401, "UNAUTHORIZED", message, headers={"WWW-Authenticate": "Bearer"})
