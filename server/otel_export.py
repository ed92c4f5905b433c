"""Sending traces by OTLP: one line in the log for each time that the collector cannot be reached, and a short end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

SHUTDOWN_SECONDS = 2.0
"""What sending the last spans may take at the end; then they are dropped."""

ABANDON_SECONDS = 0.3
"""What a request under way gets to notice that it is given up."""

DEFAULT_ENDPOINT = "http://localhost:4318"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_WORDY = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "urllib3.connectionpool")
"""Who says in many lines what is said in one here."""

_logger = structlog.get_logger("lumos")


def endpoint_of(environment: Mapping[str, str]) -> tuple[str, str]:
    """Where the traces go, without credentials, and the variable that says so or could."""
    variable = next((name for name in ENDPOINT_VARIABLES if environment.get(name)), ENDPOINT_VARIABLES[-1])
    parts = urlsplit(environment.get(variable) or DEFAULT_ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl(), variable


class TellingExporter:
    """An exporter that logs when its spans do not get through any more, and when they do again. Used in one thread."""

    def __init__(self, exporter: SpanExporter, reason: LastError) -> None:
        self._exporter = exporter
        self._reason = reason
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them."""
        result = self._exporter.export(spans)
        failed = result.name != "SUCCESS"
        if failed != self._failing:
            self._failing = failed
            endpoint, variable = endpoint_of(os.environ)
            if failed:
                _logger.warning(
                    "OpenTelemetry: traces are not sent and are lost",
                    endpoint=endpoint,
                    variable=variable,
                    reason=self._reason.text,
                )
            else:
                _logger.info("OpenTelemetry: traces are sent again", endpoint=endpoint)
        return result

    def shutdown(self) -> None:
        """Send no more; a retry under way is given up."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Whether nothing waits in the exporter."""
        return self._exporter.force_flush(timeout_millis)


class LastError(logging.Handler):
    """Keeps the last error that was logged, and nothing else."""

    text = "unknown"

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it if it is one."""
        if record.levelno >= logging.ERROR:
            self.text = record.getMessage()[:200]


@contextmanager
def heard_alone() -> Iterator[LastError]:
    """While the block runs, what the exporter's own modules log goes nowhere but here."""
    handler = LastError()
    loggers = [logging.getLogger(name) for name in _WORDY]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield handler
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True


def shut_down(provider: TracerProvider, exporter: TellingExporter) -> None:
    """Send what is left, within ``SHUTDOWN_SECONDS``. Blocks for that long.

    OpenTelemetry itself waits for the retries of a request under way, 30 s at most.
    """
    ending = threading.Thread(target=provider.shutdown, name="otel-end", daemon=True)
    ending.start()
    ending.join(SHUTDOWN_SECONDS)
    if ending.is_alive():
        exporter.shutdown()
        ending.join(ABANDON_SECONDS)
