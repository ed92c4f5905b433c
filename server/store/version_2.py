"""Schema version 2: runs' events, and the keys under which clients repeat a request.

A run's row tells what its events are good for: without ``reserved_seq`` none are kept; with it and without
``terminal_seq`` the run is under way, or the process that had it died; with both they can be read to the end.
"""

from __future__ import annotations

BOTH = (
    "ALTER TABLE runs ADD COLUMN reserved_seq BIGINT",
    "ALTER TABLE runs ADD COLUMN terminal_seq BIGINT",
    "ALTER TABLE runs ADD COLUMN memory_updates INTEGER",
    "ALTER TABLE runs ADD COLUMN usage_estimated BOOLEAN",
    "CREATE INDEX runs_with_open_events ON runs (created_at) WHERE reserved_seq IS NOT NULL AND terminal_seq IS NULL",
    "CREATE INDEX runs_with_events ON runs (created_at) WHERE reserved_seq IS NOT NULL",
    """
    CREATE INDEX runs_with_events_by_session ON runs (tenant_id, agent_id, user_id, session_id)
        WHERE reserved_seq IS NOT NULL
    """,
    """
    CREATE TABLE run_events (
        run_id {text} NOT NULL REFERENCES runs (run_id) ON DELETE CASCADE, seq BIGINT NOT NULL, event TEXT NOT NULL,
        PRIMARY KEY (run_id, seq)
    )
    """,
    """
    CREATE TABLE idempotency_keys (
        {owner}, key {text} NOT NULL, run_id {text} NOT NULL, fingerprint {bytes} NOT NULL, created_at {text} NOT NULL,
        PRIMARY KEY (tenant_id, user_id, agent_id, key)
    )
    """,
    "CREATE INDEX idempotency_keys_by_run ON idempotency_keys (run_id)",
    "CREATE INDEX idempotency_keys_by_agent ON idempotency_keys (tenant_id, agent_id)",
)
