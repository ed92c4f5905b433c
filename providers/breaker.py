"""A circuit breaker: a provider that keeps failing is left alone for a while, then probed by one request."""

from __future__ import annotations

from math import inf

import msgspec
import trio


class BreakerLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a breaker opens and for how long.

    Attributes:
        failures: so many failures in a row open it.
        open_seconds: so long nothing is sent; then one request probes.
    """

    failures: int = 5
    open_seconds: float = 30.0


class CircuitBreaker:
    """Counts one provider's failures. Closed lets all through, open none, half-open one probe at a time."""

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._failures = 0
        self._opens_until = -inf
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether the last failures have closed the way (a probe may be due all the same)."""
        return self._failures >= self._limits.failures

    @property
    def seconds_to_probe(self) -> float:
        """How long until a request may go through; 0 if one may now."""
        if not self.is_open:
            return 0.0
        return max(0.0, self._opens_until - trio.current_time())

    def admit(self) -> bool:
        """Whether a request may go now. Taking the probe's place counts: its outcome must be told."""
        if not self.is_open:
            return True
        if self._probing or self.seconds_to_probe > 0:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """The provider answered: close."""
        self._failures = 0
        self._probing = False

    def failed(self) -> None:
        """The provider failed: count, and open (again) when it is enough."""
        self._failures += 1
        self._probing = False
        if self.is_open:
            self._opens_until = trio.current_time() + self._limits.open_seconds

    def released(self) -> None:
        """The request was given up for a reason that says nothing of the provider; a probe may be made again."""
        self._probing = False
