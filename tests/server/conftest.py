"""Fixtures that the server's tests share."""

from __future__ import annotations

from tests.harness.postgres import (
    bare_postgres_url,
    database,
    database_url,
    postgres_cluster,
    postgres_url,
)
from tests.harness.redis import redis_server

__all__ = ["bare_postgres_url", "database", "database_url", "postgres_cluster", "postgres_url", "redis_server"]
