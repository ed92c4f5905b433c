"""Runs of other workers as what requests work on: read from Redis here, stopped and forgotten where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from engine import Owner, TextDelta, UsageUpdate

from .redis_link import RedisAwayError
from .remote_log import RemoteLog
from .run_directory import SourceUnavailableError
from .run_view import RunView, status_of
from .store.rows import RunStatus
from .worker_mail import Forget

if TYPE_CHECKING:
    from .shared_log import SharedLog


class SharedRun:
    """Another worker's run; a ``RunHandle``."""

    memory_updates = 0

    def __init__(self, run_id: str, facts: dict[str, str], log: RemoteLog, shared: SharedLog) -> None:
        self.run_id = run_id
        self.agent_id = facts.get("agent_id", "")
        self.owner = owner_of(facts)
        self.log = log
        self._facts = facts
        self._shared = shared

    def view(self) -> RunView:
        """Its state, as far as it is known here."""
        terminal = self.log.terminal
        events = [entry.event for entry in self.log.entries]
        said = "".join(event.content for event in events if isinstance(event, TextDelta))
        reported = [event.usage for event in events if isinstance(event, UsageUpdate)]
        return RunView(
            run_id=self.run_id,
            agent_id=self.agent_id,
            status="running" if terminal is None else status_of(terminal),
            last_seq=self.log.last_seq,
            response=said if terminal is None else terminal.response,
            elapsed_ms=_number(self._facts.get("elapsed_ms")),
            ttfb_ms=_number(self._facts.get("ttfb_ms")),
            usage=terminal.usage if terminal is not None else reported[-1] if reported else None,
            terminal=terminal,
        )

    async def stop(self, reason: str = "requested") -> None:
        """Have its worker stop it; returns once that is known here, or after ``STOP_SECONDS``.

        Raises:
            SourceUnavailableError: Redis is away: whether it stops is not known.
        """
        await self._shared.stop([self.log], reason)

    async def forget(self) -> None:
        """Stop it, then drop its events everywhere. Raises as ``stop``."""
        await self.stop()
        try:
            await self._shared.send(self.log.owner, Forget(self.run_id))
        except RedisAwayError as error:
            raise SourceUnavailableError(str(error)) from error
        await self._shared.forget(self.run_id)


def owner_of(facts: Mapping[str, str]) -> Owner:
    """Whose run it is, by its hash."""
    return Owner(
        tenant_id=facts.get("tenant_id", ""),
        user_id=facts.get("user_id", ""),
        session_id=facts.get("session_id", ""),
    )


def forgotten_view(run_id: str, facts: Mapping[str, str]) -> RunView:
    """How a run ended whose events are forgotten: nothing that it said, though some of it may still be known here."""
    return RunView(
        run_id=run_id,
        agent_id=facts.get("agent_id", ""),
        status=cast(RunStatus, facts.get("ended", "stop")),
        last_seq=0,
        response="",
        elapsed_ms=_number(facts.get("elapsed_ms")),
        ttfb_ms=_number(facts.get("ttfb_ms")),
        usage=None,
        terminal=None,
    )


def _number(text: str | None) -> float | None:
    return float(text) if text else None
