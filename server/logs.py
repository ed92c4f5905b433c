"""Structured log lines: JSON for machines, coloured text on a terminal; one line at each turning point of a run."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from engine import AgentStopped, Error, Run

LOG_LEVELS = ("debug", "info", "warning", "error")


class LossyOutput:
    """A file for log lines that drops what it cannot take (its reader has gone, its disk is full): serving goes on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write, or drop, the text."""
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        """Flush, or drop, what is buffered."""
        with suppress(OSError):
            self._file.flush()


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
        renderers: list[Any] = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    else:
        tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
        renderers = [tracebacks, structlog.processors.JSONRenderer()]
    output: Any = LossyOutput(sys.stderr)
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(output),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(output)
    meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[meta, *renderers]))
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[handler], force=True)


class RunLogger:
    """Logs ``run.started``, ``run.first_token`` and ``run.ended``; never a prompt, an answer or a key."""

    def __init__(self) -> None:
        self._logger = structlog.get_logger("lumos")

    def run_started(self, run: Run) -> None:
        """Log which agent, provider and model the run asks."""
        self._logger.info(
            "run.started",
            run_id=run.id,
            agent_id=run.spec.agent_id,
            provider=run.spec.provider.name,
            model=run.spec.request.model,
        )

    def run_first_token(self, run: Run) -> None:
        """Log the time to the first content piece."""
        self._logger.info("run.first_token", run_id=run.id, ttfb_ms=_milliseconds(run.ttfb))

    def run_ended(self, run: Run) -> None:
        """Log how the run ended, after how long, and how many tokens it gave."""
        usage = run.usage
        self._logger.info(
            "run.ended",
            run_id=run.id,
            agent_id=run.spec.agent_id,
            reason=_reason(run),
            elapsed_ms=_milliseconds(run.elapsed),
            tokens=usage.output_tokens if usage else 0,
            tokens_estimated=bool(usage and usage.estimated),
        )

    def run_crashed(self, run: Run, bug: BaseException) -> None:
        """Log a bug of ours with its traceback."""
        self._logger.error("run.crashed", run_id=run.id, exc_info=bug)


def _reason(run: Run) -> str:
    match run.log.terminal:
        case Error(code):
            return f"error:{code}"
        case AgentStopped(reason):
            return f"stop:{reason}"
    return "done"


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
