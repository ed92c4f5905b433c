"""The log of requests that were refused for who asks or how often: guessed keys, clients that do not wait."""

from __future__ import annotations

from typing import Any

import structlog
import trio
from quart import has_request_context, request

from .keys import parse_key

LOGGED_STATUSES = frozenset({401, 429})
LINES_PER_SECOND = 10
MAX_PATH_CHARS = 200

_logger = structlog.get_logger("lumos")


class RefusalLog:
    """One line for each such request, ``LINES_PER_SECOND`` at most; the next line counts those that were left out."""

    def __init__(self) -> None:
        self._second = -1.0
        self._lines = 0
        self._left_out = 0

    def tell(self, status: int, code: str) -> None:
        """The request under way is refused. Neither a key's secret nor the query is logged."""
        if status not in LOGGED_STATUSES or not has_request_context() or not self._has_room():
            return
        facts: dict[str, Any] = {"left_out_before": self._left_out} if self._left_out else {}
        self._left_out = 0
        key_id = _claimed_key_id()
        if key_id is not None:
            facts |= {"key_id": key_id}
        path = request.path.encode("unicode_escape").decode()[:MAX_PATH_CHARS]
        _logger.warning(
            "request.refused", status=status, code=code, path=path, client=request.remote_addr or "unknown", **facts
        )

    def _has_room(self) -> bool:
        now = trio.current_time()
        if not self._second <= now < self._second + 1:
            self._second, self._lines = now, 0
        self._lines += 1
        if self._lines > LINES_PER_SECOND:
            self._left_out += 1
        return self._lines <= LINES_PER_SECOND


def _claimed_key_id() -> str | None:
    """Whose key the request claims to have; that the secret is the right one is not said."""
    bearer = request.headers.get("Authorization", "").strip().partition(" ")[2]
    for text in (request.headers.get("X-API-Key", ""), bearer):
        key = parse_key(text.strip())
        if key is not None:
            return key.key_id
    return None
