"""Signed links to one run's events: who has the link reads them without a key, until it expires.

A token is ``<run id>.<expiry, seconds since 1970>.<HMAC-SHA256 of both>``, in URL-safe characters. Nothing about it is
stored: deleting the run takes all its links back.
"""

from __future__ import annotations

import hmac
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256

import msgspec

from engine.run import utc_now

MIN_SECRET_CHARS = 16
TOKEN = r"[A-Za-z0-9_.-]{1,160}"

_PARTS = re.compile(r"([A-Za-z0-9_-]{1,64})\.([0-9]{1,12})\.([A-Za-z0-9_-]{43})", re.ASCII)
_PURPOSE = b"lumos share link 1\0"
"""What else the secret may sign one day is no share link."""


class BadSecretError(ValueError):
    """The secret is too short to sign with."""


class SharedRun(msgspec.Struct, frozen=True):
    """What a token opens.

    Attributes:
        expires_at: seconds since 1970.
        seconds_left: until then; 0 or less once it has expired.
    """

    run_id: str
    expires_at: int
    seconds_left: float


class ShareLinks:
    """Makes tokens and checks them.

    Attributes:
        lasting: whether tokens outlive this server: the secret was given, and will be again.
    """

    def __init__(self, secret: str = "", wall_clock: Callable[[], datetime] = utc_now, *, lasting: bool = True) -> None:
        """Without a secret, a random one of this process. ``lasting`` is whether the next one will get it too.

        Raises:
            BadSecretError: it is shorter than ``MIN_SECRET_CHARS``.
        """
        if secret and len(secret) < MIN_SECRET_CHARS:
            raise BadSecretError(f"the share secret is shorter than {MIN_SECRET_CHARS} characters")
        self.lasting = bool(secret) and lasting
        self._key = secret.encode() or secrets.token_bytes(32)
        self._wall_clock = wall_clock

    def make(self, run_id: str, seconds: int) -> tuple[str, datetime]:
        """A token for the run, and when it expires."""
        expires_at = int(self._wall_clock().timestamp()) + seconds
        signed = f"{run_id}.{expires_at}"
        return f"{signed}.{self._signature(signed)}", datetime.fromtimestamp(expires_at, UTC)

    def open(self, token: str) -> SharedRun | None:
        """What the token is for, expired or not; None for one that was not signed here."""
        parts = _PARTS.fullmatch(token)
        if parts is None:
            return None
        run_id, expires_at, signature = parts.groups()
        if not hmac.compare_digest(signature, self._signature(f"{run_id}.{expires_at}")):
            return None
        left = int(expires_at) - self._wall_clock().timestamp()
        return SharedRun(run_id, int(expires_at), left)

    def _signature(self, text: str) -> str:
        digest = hmac.digest(self._key, _PURPOSE + text.encode(), sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()
