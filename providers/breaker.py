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


class Permit:
    """Leave to send one request; whoever holds it tells the breaker how that went, and releases it in the end.

    ``period`` is the one between two turns of the breaker that the request belongs to. An outcome from an earlier one
    says nothing new: it neither closes nor opens the breaker.
    """

    __slots__ = ("period",)

    def __init__(self, period: int) -> None:
        self.period = period


class CircuitBreaker:
    """Counts one provider's failures. Closed lets all through, open none, half-open one probe at a time.

    Attributes:
        is_open: whether the last failures have closed the way (a probe may be due all the same).
    """

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self.is_open = False
        self._failures = 0
        self._opens_until = -inf
        self._probe: Permit | None = None
        self._period = 0
        self._permit = Permit(0)

    @property
    def seconds_to_probe(self) -> float:
        """How long until a request may go through; 0 if one may now."""
        if not self.is_open:
            return 0.0
        return max(0.0, self._opens_until - trio.current_time())

    def admit(self) -> Permit | None:
        """The permit for a request, the only probe's if the breaker is half-open; None if nothing may be sent now."""
        if not self.is_open:
            return self._permit
        if self._probe is not None or self.seconds_to_probe > 0:
            return None
        self._probe = Permit(self._period)
        return self._probe

    def succeeded(self, permit: Permit) -> None:
        """The provider answered: close. A probe's request is from here on the first of the new period."""
        if permit.period != self._period:
            return
        if self.is_open:
            self._turn()
            permit.period = self._period
        self._failures = 0
        self.is_open = False

    def failed(self, permit: Permit) -> None:
        """The provider failed: count, and open (again) when it is enough."""
        if permit.period != self._period:
            return
        self._failures += 1
        self.is_open = self._failures >= self._limits.failures
        if self.is_open:
            self._turn()
            self._opens_until = trio.current_time() + self._limits.open_seconds

    def released(self, permit: Permit) -> None:
        """The request is over; if it was the probe and told no outcome, another one may be made."""
        if permit is self._probe:
            self._probe = None

    def _turn(self) -> None:
        self._period += 1
        self._permit = Permit(self._period)
        self._probe = None
