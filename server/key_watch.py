"""Streams end with the key that they are read with: a revoked one gets nothing more than KEY_SECONDS of them."""

from __future__ import annotations

from math import inf

import structlog
import trio

from .auth import KEY_SECONDS, Gatekeeper
from .errors import ApiError
from .principal import Principal

ASK_SECONDS = 1.0
"""How long a stream stands still for a store that does not answer; then it goes on until it is time to ask again."""

_logger = structlog.get_logger("lumos")


class KeyRevokedError(Exception):
    """The key that a stream is read with counts no longer: the stream breaks off."""


class KeyWatch:
    """Whether the reader of one response, let in just now, still is. No timer: whoever sends looks at ``due_at``.

    Attributes:
        due_at: when to ``check`` again before anything more is sent, on trio's clock.
    """

    __slots__ = ("_caller", "_gatekeeper", "due_at")

    def __init__(self, gatekeeper: Gatekeeper, caller: Principal) -> None:
        self._gatekeeper = gatekeeper
        self._caller = caller
        self.due_at = gatekeeper.let_in_until(caller)

    async def check(self) -> None:
        """Ask the gatekeeper, who asks the store once for all streams of a key. A store that is away ends nothing.

        Raises:
            KeyRevokedError: the caller is let in no longer.
        """
        due_at = trio.current_time() + KEY_SECONDS
        try:
            with trio.move_on_after(ASK_SECONDS):
                due_at = await self._gatekeeper.counts_until(self._caller)
        except ApiError:
            due_at = trio.current_time() + KEY_SECONDS
        if due_at == -inf:
            _logger.info("stream.key_revoked", key_id=self._caller.key_id)
            raise KeyRevokedError
        self.due_at = due_at
