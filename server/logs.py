"""Structured log lines: JSON for machines, coloured text on a terminal; one line at each turning point of a run."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog
from structlog.tracebacks import ExceptionDictTransformer

from engine import AgentStopped, Error, Run

LOG_LEVELS = ("debug", "info", "warning", "error")


OUR_PACKAGES = ("engine", "providers", "server")
"""What their modules log through ``logging`` has the level of our own lines; libraries are heard from warning on."""

STANDARD_ERROR = 2
MAX_WAITING_CHARS = 1 << 20
"""How much log text waits for a reader of standard error that is behind; what comes on top is dropped."""

FLUSH_SECONDS = 1.0
"""What the log gets at exit to be written."""

GATHER_SECONDS = 0.05
"""What a line waits for others to be written with it. A process that is killed may lose so much of its log."""


class LogOutput:
    """A file for log lines that never makes who logs wait: a thread writes them, at most ``GATHER_SECONDS`` later.

    It is woken for the first of several lines only: waking a thread takes the processor from the one that logs.
    Lines are dropped, and counted, while a reader that does not read has ``MAX_WAITING_CHARS`` before it, and when the
    system refuses a write (the reader has gone, the disk is full). ``tell_dropped`` makes the line that tells how many.

    It writes to the bare descriptor. A thread inside ``sys.stderr`` holds that file's lock, on which Python aborts at
    exit.
    """

    def __init__(self, descriptor: int, tell_dropped: Callable[[int], str]) -> None:
        self._descriptor = descriptor
        self._tell_dropped = tell_dropped
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._lines: list[str] = []
        self._waiting_chars = 0
        self._dropped = 0
        self._asleep = self._hurried = self._refused = False
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        """Take one line with its end, or drop it."""
        with self._lock:
            if self._waiting_chars + len(line) > MAX_WAITING_CHARS:
                self._dropped += 1
                return
            self._lines.append(line)
            self._waiting_chars += len(line)
            if self._asleep:
                self._asleep = False
                self._changed.notify_all()

    debug = info = warning = error = critical = exception = msg = write
    """So that it is what structlog writes its lines to, whatever their level."""

    def flush(self) -> None:
        """The thread does."""

    def wait_written(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Block until every line is written or refused, so many seconds at most; whether they are."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._waiting_chars or self._has_to_tell), seconds)

    @property
    def _has_to_tell(self) -> bool:
        """Whether lines were dropped, and nobody was told; not while the system refuses all that is written."""
        return bool(self._dropped) and not self._refused

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._asleep = not self._lines
                self._changed.wait_for(lambda: self._lines or self._has_to_tell)
                self._changed.wait_for(lambda: self._hurried, GATHER_SECONDS)
                self._asleep = self._hurried = False
                lines, self._lines = self._lines, []
                dropped = self._dropped
            lost = 0 if self._write_out("".join(lines)) else len(lines)
            told = dropped if dropped and self._write_out(self._tell_dropped(dropped)) else 0
            with self._changed:
                self._dropped += lost - told
                self._refused = lost > 0 or told < dropped
                self._waiting_chars -= sum(map(len, lines))
                self._changed.notify_all()

    def _write_out(self, text: str) -> bool:
        unwritten = text.encode("utf-8", "backslashreplace")
        try:
            while unwritten:
                unwritten = unwritten[os.write(self._descriptor, unwritten) :]
        except OSError:
            return False
        return True


def configure_logging(level: str) -> None:
    """Send Lumos's log and the libraries' to standard error, from that level on. Call once, at start.

    Tracebacks come without local variables: those hold prompts and keys.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty():
        colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        plain = structlog.dev.plain_traceback
        renderers: list[Any] = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
        ours = [*shared, *renderers, _end_line]
    else:
        tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
        renderers = [tracebacks, structlog.processors.JSONRenderer(_to_json)]
        ours = [_JsonLine(tracebacks)]
    output = _open_output(ours)
    structlog.configure(
        processors=ours,
        wrapper_class=_logger_class(threshold),
        logger_factory=lambda *_: output,
        cache_logger_on_first_use=False,  # there are few lines, and who configures again is to be heard
    )
    handler = logging.StreamHandler(output)
    meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[meta, *renderers]))
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[handler], force=True)
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(threshold)


def _logger_class(threshold: int) -> type[Any]:
    """structlog's, with a shorter way to a line of ``info``: a run has three, and each was 49 calls of functions."""
    usual = structlog.make_filtering_bound_logger(threshold)
    return type("Logger", (usual,), {"info": _info}) if threshold <= logging.INFO else usual


def _info(bound: Any, event: str, **facts: Any) -> None:
    """Log a line; no text is put into ``event``."""
    line: Any = {**bound._context, **facts, "event": event}
    try:
        for process in bound._processors:
            line = process(bound._logger, "info", line)
    except structlog.DropEvent:  # a test listens
        return
    bound._logger.info(line)


def _end_line(_logger: Any, _method: str, line: Any) -> str:
    return f"{line}\n"


class _JsonLine:
    """What the processors for libraries' lines do, in one step."""

    def __init__(self, tracebacks: structlog.types.Processor) -> None:
        self._tracebacks = tracebacks

    def __call__(self, logger: Any, method: str, facts: structlog.types.EventDict) -> str:
        line: Any = structlog.contextvars.merge_contextvars(logger, method, facts)
        line["level"] = "error" if method == "exception" else method
        line["timestamp"] = f"{datetime.now(UTC).isoformat()[: -len('+00:00')]}Z"
        if "exc_info" in line:
            line = self._tracebacks(logger, method, line)
        return f"{_to_json(line)}\n"


def _to_json(line: Any, **_: Any) -> str:
    """As JSON in UTF-8: 1 µs, where ``json`` takes 8. What msgspec cannot write is described."""
    try:
        return msgspec.json.encode(line, enc_hook=repr).decode()
    except (ValueError, OverflowError, RecursionError):  # half an emoji, a number of 65 bits
        return json.dumps(line, default=repr)


def flush_log() -> None:
    """Block until what was logged is written, for ``FLUSH_SECONDS`` at most: for who leaves without ``atexit``."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and isinstance(handler.stream, LogOutput):
            handler.stream.wait_written()


def _open_output(processors: list[Any]) -> LogOutput:
    """The output to standard error, flushed at exit; its own line looks like the others and has no level to pass."""
    warnings = structlog.make_filtering_bound_logger(logging.WARNING)
    renderer = structlog.wrap_logger(structlog.ReturnLogger(), processors=processors, wrapper_class=warnings)
    output = LogOutput(STANDARD_ERROR, lambda lines: str(renderer.warning("log.dropped", lines=lines)))
    atexit.register(output.wait_written)
    return output


class RunLogger:
    """Logs ``run.started``, ``run.first_token`` and ``run.ended``; never a prompt, an answer or a key."""

    def __init__(self) -> None:
        self._logger = structlog.get_logger("lumos").bind()

    def run_started(self, run: Run) -> None:
        """Log which agent, provider and model the run asks."""
        self._logger.info(
            "run.started",
            run_id=run.id,
            agent_id=run.spec.agent_id,
            provider=run.spec.provider.name,
            model=run.spec.request.model,
            **_owner(run),
        )

    def run_first_token(self, run: Run) -> None:
        """Log the time to the first content piece."""
        self._logger.info("run.first_token", run_id=run.id, ttfb_ms=run.ttfb_ms)

    def run_ended(self, run: Run) -> None:
        """Log how the run ended, after how long, and how many tokens it gave; a failure is a warning that says why."""
        usage = run.usage
        facts: dict[str, Any] = {
            "run_id": run.id,
            "agent_id": run.spec.agent_id,
            "reason": _reason(run),
            "elapsed_ms": run.elapsed_ms,
            "tokens": usage.output_tokens if usage else 0,
            "tokens_estimated": bool(usage and usage.estimated),
            **_owner(run),
        }
        if usage and usage.provider:  # who of an agent's several providers answered
            facts |= {"provider": usage.provider, "model": usage.model}
        match run.log.terminal:
            case Error(_, content):
                self._logger.warning("run.ended", **facts, error=content)
            case _:
                self._logger.info("run.ended", **facts)

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """Log a bug of ours with its traceback."""
        self._logger.error("run.crashed", run_id=run.id, exc_info=bug)


def _owner(run: Run) -> dict[str, str]:
    """Whose it is, as far as it is anybody's. The key's id comes from the request, see ``routing``."""
    return {name: value for name, value in msgspec.structs.asdict(run.spec.owner).items() if value}


def _reason(run: Run) -> str:
    match run.log.terminal:
        case Error(code):
            return f"error:{code}"
        case AgentStopped(reason):
            return f"stop:{reason}"
    return "done"
