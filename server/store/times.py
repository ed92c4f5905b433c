"""Times as the store keeps them: texts that sort as the times do."""

from __future__ import annotations

from datetime import datetime


def time_text(moment: datetime) -> str:
    """ISO 8601 with microseconds; the moment is in UTC."""
    return moment.isoformat(timespec="microseconds")
