"""The process of a tool server: how it starts, what it may see, where its errors go, and that it is gone in the end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import msgspec
import trio

PASSED_ON = ("PATH", "HOME", "LANG")
"""What every process gets of our environment; keys and the rest of it are no business of a tool's."""

EXIT_SECONDS = 1.0
"""What a process gets to exit after each step of the way out: its input closed, SIGTERM, SIGKILL."""

MAX_LINE_BYTES = 16 * 2**20
"""Of one message that a server sends; a longer one ends its session."""

LOG_LINE_CHARS = 500
LOG_LINES_PER_MINUTE = 100

LAST_LINES = 5
LAST_LINE_CHARS = 200
"""What is kept of the end of a process's standard error, to say why it has gone."""

READ_BYTES = 65_536

_logger = logging.getLogger(__name__)


class LineTooLongError(Exception):
    """A tool server sent a line of more than ``MAX_LINE_BYTES``."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What to start, and with which environment: all of it, ours is not added."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    cwd: str | None = None


def passed_environment(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The part of ``environment`` that a process gets: ``PASSED_ON`` and these names, as far as they are set."""
    return {name: environment[name] for name in (*PASSED_ON, *names) if name in environment}


class LastWords:
    """How a process ended: the end of what it wrote to its standard error, and its exit code unless we ended it."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._lines: deque[str] = deque(maxlen=LAST_LINES)

    def hear(self, line: str) -> None:
        """A line of its standard error."""
        self._lines.append("".join(c if c.isprintable() else " " for c in line[:LAST_LINE_CHARS]))

    def __str__(self) -> str:
        """In one line; empty if nothing is known."""
        how = []
        if self.exit_code is not None:
            how.append(f"exit code {self.exit_code}" if self.exit_code >= 0 else f"ended by signal {-self.exit_code}")
        if self._lines:
            how.append(f"its last lines: {' | '.join(self._lines)}")
        return "; ".join(how)


async def run_process(
    command: Command, talk: Callable[[trio.Process], Awaitable[None]], last_words: LastWords | None = None
) -> None:
    """Start the process, ``talk`` with it, and return when it is gone with all that it started in its process group.

    What it writes to its standard error is logged, and ``last_words`` hear it. Once ``talk`` has returned, raised or
    been cancelled, the end takes at most three times ``EXIT_SECONDS``.

    Raises:
        OSError: it could not be started.
    """
    process = await trio.lowlevel.open_process(
        list(command.argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(command.environment),
        cwd=command.cwd,
        start_new_session=True,
    )
    last_words = last_words or LastWords()
    errors = LineLog(command.name, last_words.hear)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_log_errors, process, errors)
            await talk(process)
            nursery.cancel_scope.cancel(reason="the talk with the tool server has ended")
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 3 * EXIT_SECONDS + 1):
            last_words.exit_code = await _stop(process, errors)
            await _close(process)


async def _stop(process: trio.Process, errors: LineLog) -> int | None:
    """Close its input, which is the polite way; then ask its group to end; then end it.

    The exit code is of interest if no signal of ours was needed; else None.
    """
    assert process.stdin is not None
    await trio.aclose_forcefully(process.stdin)
    for step in (None, signal.SIGTERM, signal.SIGKILL):
        if step is not None:
            _signal_group(process, step)
        with trio.move_on_after(EXIT_SECONDS) as waiting:
            await _wait_gone(process, errors)
        if not waiting.cancelled_caught:
            return process.returncode if step is None else None
    _logger.error("tool server %s: process %d is still there after SIGKILL", errors.name, process.pid)
    return None


async def _wait_gone(process: trio.Process, errors: LineLog) -> None:
    """Until it has exited and nobody has its output open. Reads on: who is stuck in a full pipe cannot exit."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_discard_output, process)
        nursery.start_soon(_log_errors, process, errors)
        await process.wait()


async def _close(process: trio.Process) -> None:
    """End what is left of its group, and close our ends of the pipes."""
    _signal_group(process, signal.SIGKILL)
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        await trio.aclose_forcefully(stream)


def _signal_group(process: trio.Process, number: int) -> None:
    """To all of its group; its number is the process's, which began a session of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _discard_output(process: trio.Process) -> None:
    assert process.stdout is not None
    with suppress(trio.BrokenResourceError):
        while await process.stdout.receive_some(READ_BYTES):
            pass


async def _log_errors(process: trio.Process, errors: LineLog) -> None:
    assert process.stderr is not None
    with suppress(trio.BrokenResourceError):
        while data := await process.stderr.receive_some(READ_BYTES):
            errors.feed(bytes(data))
    errors.close()


class LineSplitter:
    """Makes lines of what is read in pieces."""

    def __init__(self) -> None:
        self._gathered = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that ``data`` completes, without their ends.

        Raises:
            LineTooLongError: the line begun has more than ``MAX_LINE_BYTES``.
        """
        *ends, begun = data.split(b"\n")
        lines = []
        for end in ends:
            lines.append(bytes(self._gathered + end))
            self._gathered.clear()
        self._gathered += begun
        if len(self._gathered) > MAX_LINE_BYTES:
            raise LineTooLongError(f"it sent a line of more than {MAX_LINE_BYTES >> 20} MiB")
        return lines


class LineLog:
    """Logs what a process writes to its standard error, line by line, but no more than a log can bear.

    A line is cut at ``LOG_LINE_CHARS``; what comes beyond ``LOG_LINES_PER_MINUTE`` is counted instead.
    """

    def __init__(self, name: str, hear: Callable[[str], None] | None = None) -> None:
        """``hear`` gets every line, of those that are not logged too."""
        self.name = name
        self._hear = hear
        self._partial = b""
        self._minute = trio.current_time()
        self._lines = 0

    def feed(self, data: bytes) -> None:
        """Take what was read, whole lines or not."""
        *lines, partial = (self._partial + data).split(b"\n")
        self._partial = partial[: LOG_LINE_CHARS * 4]
        for line in lines:
            self.log(line)

    def close(self) -> None:
        """The last line may lack its end."""
        self.log(self._partial)
        self._partial = b""

    def log(self, line: bytes) -> None:
        """One whole line."""
        text = line.decode(errors="replace").strip()
        if not text:
            return
        if self._hear is not None:
            self._hear(text)
        if trio.current_time() - self._minute >= 60:
            self._minute = trio.current_time()
            if self._lines > LOG_LINES_PER_MINUTE:
                _logger.info("tool server %s: %d lines more", self.name, self._lines - LOG_LINES_PER_MINUTE)
            self._lines = 0
        self._lines += 1
        if self._lines <= LOG_LINES_PER_MINUTE:
            _logger.info("tool server %s: %s", self.name, text[:LOG_LINE_CHARS])
