"""Fixtures that the server's tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from tests.harness.postgres import (
    bare_postgres_url,
    database,
    database_url,
    postgres_cluster,
    postgres_url,
)
from tests.harness.redis import redis_server

__all__ = ["bare_postgres_url", "database", "database_url", "postgres_cluster", "postgres_url", "redis_server"]


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """What a command that runs in the test's process sets up for its log is gone with the test."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    root.handlers[:] = handlers
    for ours in ("engine", "providers", "server"):
        logging.getLogger(ours).setLevel(logging.NOTSET)
