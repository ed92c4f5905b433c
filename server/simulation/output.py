"""What workers log in a simulated world, gathered as text instead of going to standard error."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from server.logs import OUR_PACKAGES


@contextmanager
def captured_output() -> Iterator[io.StringIO]:
    """Everything that is logged while the block lasts, as ``lumos serve`` logs it, without times."""
    output = io.StringIO()
    before = structlog.get_config() if structlog.is_configured() else None
    shared: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    renderers: list[Any] = [tracebacks, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(output),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[meta, *renderers]))
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in OUR_PACKAGES]
    levels = [logger.level for logger in ours]
    handlers = root.handlers[:]
    try:
        root.handlers[:] = [handler]
        for logger in ours:
            logger.setLevel(logging.INFO)
        yield output
    finally:
        root.handlers[:] = handlers
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)
        structlog.reset_defaults()
        if before is not None:
            structlog.configure(**before)
