"""Schema version 4: what came last of all runs under way, a row for each batch (``recent_events.py``)."""

from __future__ import annotations

BOTH = (
    """
    CREATE TABLE recent_events (
        writer {text} NOT NULL, number BIGINT NOT NULL, events {bytes} NOT NULL,
        PRIMARY KEY (writer, number)
    )
    """,
)
