"""Who hears of the turning points of every run: the log lines and the metrics of a server, a test's notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .run import Run


class RunObserver(Protocol):
    """Hears of the turning points of every run. Synchronous; should not raise: what it raises is logged and dropped.

    A server tells some of them in trio's own loop, outside of every task: there is no ``current_task``, and so no
    ``with CancelScope`` and no ``Lock.acquire_nowait``; ``Event.set``, ``send_nowait`` and ``start_soon`` are fine.
    """

    def run_started(self, run: Run) -> None:
        """The first event is in the log."""
        ...

    def run_first_token(self, run: Run) -> None:
        """The first content piece came; ``run.ttfb`` is known."""
        ...

    def run_ended(self, run: Run) -> None:
        """The terminal event is in the log (``run.log.terminal``)."""
        ...

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """A bug of ours ended the run; its traceback is for the operator, not for clients."""
        ...


class SilentObserver:
    """An observer that does nothing."""

    def run_started(self, run: Run) -> None:
        """Do nothing."""

    def run_first_token(self, run: Run) -> None:
        """Do nothing."""

    def run_ended(self, run: Run) -> None:
        """Do nothing."""

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """Do nothing."""
