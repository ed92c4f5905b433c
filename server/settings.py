"""What ``lumos serve`` takes, as one value that can be sent to other processes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from .admission import AdmissionLimits
from .serving import ServingLimits

DEFAULT_DATABASE_URL = "sqlite:///lumos.db"


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What ``lumos serve`` takes. Times in seconds.

    Attributes:
        database_url: where agents, sessions, memories and keys are.
        agents_file: TOML with ``[[agent]]`` and ``[[mcp_server]]`` tables, beside the built-in agents.
        resume_grace: how long a run goes on after its last reader has left.
        retention: how long ended runs stay in memory; after that they are read from the store.
        keep_runs_days: how long the store keeps runs' events.
        drain: how long running streams may go on after SIGTERM.
        cors_origins: whose pages may use the server from a browser.
        allowed_provider_hosts, allowed_key_variables: what tenants' admins may name in agents.
        allowed_tools: what agents made through the API may name beside the built-in tools, once there are keys.
        redis_url: where workers and hosts share their runs; None for a server that is alone.
        lease: how long a worker may be silent before the others end its runs.
        workers: how many processes.
        worker: which of them this is; empty without others.
        traces: how many runs' traces are kept in memory.
        otel: whether they are sent out by OTLP too.
        admission: how many runs this worker takes.
        share_secret: signs share links; empty for a random one of this process.
        share_secret_lasts: whether it is there again after a restart; not the one that workers get from their parent.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    database_url: str = DEFAULT_DATABASE_URL
    agents_file: Path | None = None
    resume_grace: float = 5.0
    retention: float = 600.0
    keep_runs_days: float = 30.0
    drain: float = 30.0
    cors_origins: tuple[str, ...] = ()
    allowed_provider_hosts: tuple[str, ...] = ()
    allowed_key_variables: tuple[str, ...] = ()
    allowed_tools: tuple[str, ...] = ()
    traces: int = 200
    otel: bool = False
    admission: AdmissionLimits = AdmissionLimits()
    share_secret: str = ""
    share_secret_lasts: bool = True
    redis_url: str | None = None
    lease: float = 10.0
    workers: int = 1
    worker: str = ""
    limits: ServingLimits = ServingLimits()


class SettingsError(ValueError):
    """A setting cannot be used; the text says which and why."""
