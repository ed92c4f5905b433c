"""What tools say of the memory reaches their run from any thread: sync tools work in threads of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import get_args

import trio

from .emitter import encodable
from .tools import MemoryOperation

_OPERATIONS = get_args(MemoryOperation)

_logger = logging.getLogger(__name__)


class MemoryNews:
    """Passes changes of memory keys on, in the order in which each thread tells them. Made in the run's ``trio.run``.

    A thread that was given up on may call this at any time, even when that ``trio.run`` is over: then nothing happens.

    Args:
        tell: hears of each change, always in the run's own thread.
    """

    def __init__(self, tell: Callable[[str, MemoryOperation], None]) -> None:
        self._tell = tell
        self._token = trio.lowlevel.current_trio_token()

    def pass_on(self, key: str, operation: MemoryOperation) -> None:
        """A key was changed. Never waits.

        Raises:
            TypeError, ValueError: the key is no text, or that is no operation; nothing is passed on.
        """
        if not isinstance(key, str):
            raise TypeError(f"a memory key is text, not {type(key).__name__}")
        if operation not in _OPERATIONS:
            raise ValueError(f"the operation is one of {', '.join(_OPERATIONS)}")
        key = encodable(key)
        if self._is_at_home():
            self._tell(key, operation)
            return
        try:
            # A tool's result takes the same way back, so this comes before it.
            self._token.run_sync_soon(self._tell_safely, key, operation)
        except trio.RunFinishedError:
            return  # there is nobody left to tell

    def _is_at_home(self) -> bool:
        try:
            return trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:  # a thread without a trio of its own
            return False

    def _tell_safely(self, key: str, operation: MemoryOperation) -> None:
        """What is raised here would end every run of the process, and not the tool's call."""
        try:
            self._tell(key, operation)
        except Exception:
            _logger.exception("a change of the memory could not be told")
