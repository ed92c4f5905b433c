"""``lumos serve --workers N``: a parent starts N servers on one port, replaces those that crash, and drains them all.

Each worker is a process of its own with its own listening socket (``SO_REUSEPORT``: the kernel deals the connections
out). Hypercorn's own ``workers=N`` cuts every stream at a drain, and ends all when one crashes (trap H4).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from .compose import CLEANUP_SECONDS, ServerSettings, SettingsError, run_server
from .sockets import hold_port

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
"""Before a worker that crashed is replaced; it doubles while workers live less than ``STEADY_SECONDS``."""

STEADY_SECONDS = 30.0

LEAVING_SECONDS = 3 * CLEANUP_SECONDS
"""What a worker gets beyond its drain; then it is killed."""

REFUSED = 78
"""The exit code (``EX_CONFIG``) of a worker whose settings cannot be used: another one would fare no better."""

_COMMAND = (sys.executable, "-c", "from server.workers import work; work()")

_logger = structlog.get_logger("lumos")


class WorkersFailedError(Exception):
    """A worker cannot serve with these settings; it has said why itself."""


class _Order(msgspec.Struct):
    """What a worker is told on its standard input, whose end then tells it that its parent is gone."""

    settings: ServerSettings
    log_level: str


def check_workers(settings: ServerSettings) -> None:
    """Refuse several workers that could not find each other's runs.

    Raises:
        SettingsError: there is no Redis.
    """
    if settings.workers > 1 and settings.redis_url is None:
        raise SettingsError(
            f"--workers {settings.workers} needs --redis-url: without it a worker cannot find the others' runs"
        )


async def run_workers(settings: ServerSettings, log_level: str, command: Sequence[str] = _COMMAND) -> None:
    """Serve with several processes until SIGTERM (streams may finish) or SIGINT; a second one ends all at once.

    Raises:
        SettingsError: see ``check_workers``.
        WorkersFailedError: the workers cannot use the settings.
        OSError: the address cannot be bound.
    """
    check_workers(settings)
    if not settings.share_secret:  # a link that one worker signs is good at all of them
        secret = secrets.token_urlsafe(32)
        settings = msgspec.structs.replace(settings, share_secret=secret, share_secret_lasts=False)
    with ExitStack() as held, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        settings = msgspec.structs.replace(settings, port=held.enter_context(hold_port(settings.host, settings.port)))
        crew = _Crew(settings, log_level, command)
        _logger.info("workers.started", workers=settings.workers, port=settings.port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crew.pass_on, signals)
            await crew.run()
            nursery.cancel_scope.cancel(reason="all workers have ended")
    if crew.refused:
        raise WorkersFailedError
    _logger.info("workers.ended")


class _Crew:
    """The workers that there are now."""

    def __init__(self, settings: ServerSettings, log_level: str, command: Sequence[str]) -> None:
        self._settings = settings
        self._log_level = log_level
        self._command = command
        self._processes: dict[str, trio.Process] = {}
        self._stopping = trio.Event()
        self._replacing = trio.CancelScope()
        self._signal: int = 0
        self.refused = False

    async def run(self) -> None:
        """Keep every worker alive until they are all to end, and have ended."""
        async with trio.open_nursery() as nursery:
            for number in range(1, self._settings.workers + 1):
                nursery.start_soon(self._keep, str(number))

    async def pass_on(self, signals: AsyncIterator[int]) -> None:
        """Give every signal to every worker; the first one ends the replacing, and limits how long they may take."""
        async for signum in signals:
            if not self._stopping.is_set():
                _logger.info("workers.draining", drain_seconds=self._settings.drain)
            self._stop(signum)

    def _stop(self, signum: int) -> None:
        self._signal = signum
        self._stopping.set()
        for process in self._processes.values():
            process.send_signal(signum)

    async def _keep(self, name: str) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            started_at = trio.current_time()
            code = await self._run_one(name)
            if self._stopping.is_set():
                return
            if code == REFUSED:
                self.refused = True
                self._stop(signal.SIGTERM)
                return
            pause = FIRST_PAUSE_SECONDS if trio.current_time() - started_at > STEADY_SECONDS else pause
            _logger.error("worker.crashed", worker=name, exit_code=code, replaced_in_seconds=pause)
            with trio.move_on_after(pause):
                await self._stopping.wait()
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _run_one(self, name: str) -> int:
        """Start a worker and wait for its end; it is killed if it takes too long to stop, or this is cancelled."""
        process = await trio.lowlevel.open_process(self._command, stdin=subprocess.PIPE, start_new_session=True)
        self._processes[name] = process
        try:
            await self._tell(process, name)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._kill_late, process)
                code = await process.wait()
                nursery.cancel_scope.cancel(reason="the worker has ended")
            return code
        finally:
            del self._processes[name]
            if process.returncode is None:
                process.kill()
            if process.stdin is not None:
                await trio.aclose_forcefully(process.stdin)

    async def _tell(self, process: trio.Process, name: str) -> None:
        assert process.stdin is not None
        order = _Order(msgspec.structs.replace(self._settings, worker=name), self._log_level)
        with suppress(trio.BrokenResourceError):  # it is dead already, which its end tells
            await process.stdin.send_all(msgspec.json.encode(order, enc_hook=str) + b"\n")
        if self._stopping.is_set():
            process.send_signal(self._signal)

    async def _kill_late(self, process: trio.Process) -> None:
        await self._stopping.wait()
        await trio.sleep(self._settings.drain + LEAVING_SECONDS)
        process.kill()


def work() -> None:
    """Be a worker: what to do comes on standard input. When that ends, the parent is gone, and this worker drains."""
    from .cli_support import run  # noqa: PLC0415 - click, which the parent's commands bring
    from .logs import configure_logging  # noqa: PLC0415

    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Order, dec_hook=_decode_path)
    configure_logging(order.log_level)
    structlog.contextvars.bind_contextvars(worker=order.settings.worker, pid=os.getpid())
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        run(run_server, order.settings)
    except SystemExit as refusal:
        if refusal.code:
            sys.exit(REFUSED)
    except OSError as error:
        _logger.critical("worker.refused", reason=str(error))
        sys.exit(REFUSED)


def _end_with_parent() -> None:
    """A thread, because it is to work whatever the worker's own loop does."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _decode_path(kind: type[Any], text: Any) -> Any:
    if kind is Path:
        return Path(text)
    raise NotImplementedError
