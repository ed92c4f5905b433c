"""Schema version 3: two indexes less for each start to write, and a row of ``run_events`` may hold several events.

Only the deletion of an agent asked the indexes, and it walks its tenant's messages in any case. Older versions of Lumos
cannot read the rows.
"""

from __future__ import annotations

BOTH = ("DROP INDEX memories_by_agent", "DROP INDEX sessions_by_agent")
