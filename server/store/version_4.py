"""Schema version 4: eight pages less for each start to write, and a row for each batch of what came last of all runs.

What the user said becomes a memory when the run ends, unless the run is ``unremembered``. An index that only ended runs
are asked by has only those; that a run has one message of the user's is what the key of ``runs`` sees to, as both are
added together; and a session's runs are found by its messages, those that have none by an index of theirs. Of
``recent_events`` see ``recent_events.py``.
"""

from __future__ import annotations

BOTH = (
    "ALTER TABLE runs ADD COLUMN unremembered BOOLEAN",
    """
    UPDATE runs SET unremembered = TRUE WHERE NOT EXISTS (
        SELECT 1 FROM messages WHERE messages.run_id = runs.run_id AND messages.role = 'user'
    )
    """,
    "DROP INDEX one_user_message_a_run",
    "DROP INDEX runs_under_way",
    "DROP INDEX runs_by_key",
    "DROP INDEX runs_with_events",
    "DROP INDEX runs_with_events_by_session",
    """
    CREATE INDEX runs_under_way_without_events ON runs (created_at)
        WHERE status = 'running' AND (reserved_seq IS NULL OR terminal_seq IS NOT NULL)
    """,
    "CREATE INDEX runs_by_key ON runs (key_id, ended_at) WHERE ended_at IS NOT NULL",
    "CREATE INDEX runs_with_events ON runs (created_at) WHERE reserved_seq IS NOT NULL AND status <> 'running'",
    "CREATE INDEX unremembered_runs ON runs (tenant_id, agent_id, user_id, session_id) WHERE unremembered IS NOT NULL",
    """
    CREATE TABLE recent_events (
        writer {text} NOT NULL, number BIGINT NOT NULL, events {bytes} NOT NULL,
        PRIMARY KEY (writer, number)
    )
    """,
)
