"""The closed list of error codes, and the few exceptions that carry one."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

TimeoutCode: TypeAlias = Literal["timeout.connect", "timeout.first_token", "timeout.idle"]
"""The deadlines of an attempt; a provider fails with one only if it keeps the deadlines itself (``AttemptsPiece``)."""

UpstreamErrorCode: TypeAlias = Literal[
    "upstream.auth",
    "upstream.rate_limit",
    "upstream.overloaded",
    "upstream.context_length",
    "upstream.content_policy",
    "upstream.invalid_request",
    "upstream.server",
    "upstream.protocol",
    "upstream.truncated",
    "upstream.connection",
]

ProviderErrorCode: TypeAlias = UpstreamErrorCode | TimeoutCode

ErrorCode: TypeAlias = (
    Literal[
        "timeout.total",
        "output_limit",
        "max_steps",
        "draining",
        "interrupted",
        "worker_lost",
        "internal",
    ]
    | ProviderErrorCode
)

REFUSAL_CODES: frozenset[ProviderErrorCode] = frozenset(
    {
        "upstream.auth",
        "upstream.rate_limit",
        "upstream.overloaded",
        "upstream.context_length",
        "upstream.content_policy",
        "upstream.invalid_request",
        "upstream.server",
    }
)
"""The vendor's own no: what it refuses before the first token, it does not charge for."""

PROVIDER_ERROR_CODES: frozenset[str] = frozenset(get_args(UpstreamErrorCode) + get_args(TimeoutCode))


class ProviderError(Exception):
    """The model's side failed: raised by a provider, ends the run in an ``error`` event with ``code``.

    ``str()`` of it is shown to clients: it must hold no key and no upstream body beyond the vendor's own message.
    ``retry_after`` is the vendor's wish in seconds, where it gave one.
    """

    def __init__(self, code: ProviderErrorCode, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code: ProviderErrorCode = code
        self.retry_after = retry_after


class RunFailedError(Exception):
    """A run that was awaited whole ended in an ``error`` event; ``code`` and the partial ``response`` tell the rest."""

    def __init__(self, code: ErrorCode, message: str, response: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code: ErrorCode = code
        self.response = response


class RunStoppedError(Exception):
    """A run that was awaited whole was stopped; ``reason`` and the partial ``response`` tell the rest."""

    def __init__(self, reason: str, response: str) -> None:
        super().__init__(f"the run was stopped: {reason}")
        self.reason = reason
        self.response = response


class OutputLimitError(Exception):
    """The answer outgrew ``max_run_bytes``: raised by the emitter, ends the run in ``output_limit``."""


class EventOrderError(Exception):
    """A bug of ours: an event that the order table does not allow at this point."""
