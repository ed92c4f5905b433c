"""Schema version 5: SQLite's full-text index takes memories sixty-four at a time.

Each one by itself was a third of what the end of a turn takes of the store: a segment of its own in the index, which is
merged with others later. ``memories_indexed.upto`` is the number of the last one that is in the index; those behind it
are few and short, as a long one has all indexed, and a search reads them (``search.py``). Numbers only grow
(AUTOINCREMENT). A row that is changed is one trigger's business, as SQLite does not say which of two comes first.
PostgreSQL's GIN index has a list of pending entries of its own.
"""

from __future__ import annotations

SQLITE = (
    "CREATE TABLE memories_indexed (upto INTEGER NOT NULL)",
    "INSERT INTO memories_indexed SELECT coalesce(max(number), 0) FROM memories",
    "DROP TRIGGER memories_inserted",
    "DROP TRIGGER memories_deleted",
    "DROP TRIGGER memories_updated",
    """
    CREATE TRIGGER memories_inserted AFTER INSERT ON memories
    WHEN new.number % 64 = 0 OR length(new.terms) > 1000 BEGIN
        INSERT INTO memory_index (rowid, owner, terms)
            SELECT number, owner, terms FROM memories
            WHERE number > (SELECT upto FROM memories_indexed) AND number <= new.number;
        UPDATE memories_indexed SET upto = new.number;
    END
    """,
    """
    CREATE TRIGGER memories_deleted AFTER DELETE ON memories
    WHEN old.number <= (SELECT upto FROM memories_indexed) BEGIN
        INSERT INTO memory_index (memory_index, rowid, owner, terms)
            VALUES ('delete', old.number, old.owner, old.terms);
    END
    """,
    """
    CREATE TRIGGER memories_updated AFTER UPDATE OF owner, terms ON memories BEGIN
        INSERT INTO memory_index (memory_index, rowid, owner, terms)
            SELECT 'delete', old.number, old.owner, old.terms
            WHERE old.number <= (SELECT upto FROM memories_indexed);
        INSERT INTO memory_index (rowid, owner, terms)
            SELECT new.number, new.owner, new.terms
            WHERE old.number <= (SELECT upto FROM memories_indexed);
        INSERT INTO memory_index (rowid, owner, terms)
            SELECT number, owner, terms FROM memories
            WHERE number > (SELECT upto FROM memories_indexed)
                AND new.number > (SELECT upto FROM memories_indexed) AND length(new.terms) > 1000;
        UPDATE memories_indexed SET upto = (SELECT max(number) FROM memories)
            WHERE new.number > upto AND length(new.terms) > 1000;
    END
    """,
)
