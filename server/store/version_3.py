"""Schema version 3: two indexes less for each start to write.

Only the deletion of an agent asked them, which walks its tenant's messages in any case.
"""

from __future__ import annotations

BOTH = ("DROP INDEX memories_by_agent", "DROP INDEX sessions_by_agent")
