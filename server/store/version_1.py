"""Schema version 1: the first tables. Released: never changed again; what comes later is a new version.

The words in braces are those of ``migrations.WORDS``.
"""

from __future__ import annotations

BOTH = (
    """
    CREATE TABLE agents (
        tenant_id {text} NOT NULL, id {text} NOT NULL, user_id {text}, record TEXT NOT NULL, revision INTEGER NOT NULL,
        created_at {text} NOT NULL, updated_at {text} NOT NULL,
        PRIMARY KEY (tenant_id, id)
    )
    """,
    """
    CREATE TABLE sessions (
        {owner}, session_id {text} NOT NULL, created_at {text} NOT NULL, updated_at {text} NOT NULL,
        PRIMARY KEY (tenant_id, user_id, agent_id, session_id)
    )
    """,
    "CREATE INDEX sessions_by_agent ON sessions (tenant_id, agent_id)",
    """
    CREATE TABLE runs (
        run_id {text} NOT NULL PRIMARY KEY, {owner}, session_id {text} NOT NULL, key_id {text}, status {text} NOT NULL,
        created_at {text} NOT NULL, ended_at {text}, error_code {text}, reason TEXT, response TEXT, total_steps INTEGER,
        elapsed_ms {float}, ttfb_ms {float}, input_tokens BIGINT, output_tokens BIGINT
    )
    """,
    "CREATE INDEX runs_under_way ON runs (created_at) WHERE status = 'running'",
    "CREATE INDEX runs_by_key ON runs (key_id, ended_at)",
    """
    CREATE TABLE messages (
        number {number}, {owner}, session_id {text} NOT NULL, run_id {text} NOT NULL REFERENCES runs (run_id),
        role {text} NOT NULL, content TEXT NOT NULL, images TEXT NOT NULL, tool_calls TEXT NOT NULL,
        tool_call_id {text}, tool_failed BOOLEAN NOT NULL, partial BOOLEAN NOT NULL, created_at {text} NOT NULL,
        FOREIGN KEY (tenant_id, user_id, agent_id, session_id)
            REFERENCES sessions (tenant_id, user_id, agent_id, session_id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX messages_by_session ON messages (tenant_id, user_id, agent_id, session_id, number)",
    "CREATE INDEX messages_by_run ON messages (run_id)",
    "CREATE UNIQUE INDEX one_user_message_a_run ON messages (run_id) WHERE role = 'user'",
    """
    CREATE TABLE memories (
        number {number}, {owner}, memory_id {text} NOT NULL, kind {text} NOT NULL, text TEXT NOT NULL,
        metadata TEXT NOT NULL, session_id {text}, run_id {text}, created_at {text} NOT NULL,
        updated_at {text} NOT NULL, embedding {bytes}, embedding_model {text},
        owner {text} NOT NULL, terms TEXT NOT NULL,
        UNIQUE (tenant_id, user_id, agent_id, memory_id)
    )
    """,
    "CREATE INDEX memories_by_owner ON memories (tenant_id, user_id, agent_id, number)",
    "CREATE INDEX memories_by_agent ON memories (tenant_id, agent_id)",
    """
    CREATE TABLE working_memories (
        {owner}, document TEXT NOT NULL, updated_at {text} NOT NULL,
        PRIMARY KEY (tenant_id, user_id, agent_id)
    )
    """,
    """
    CREATE TABLE api_keys (
        key_id {text} NOT NULL PRIMARY KEY, tenant_id {text} NOT NULL, user_id {text} NOT NULL, admin BOOLEAN NOT NULL,
        name {text} NOT NULL, secret_hash {bytes} NOT NULL, limits TEXT NOT NULL, created_at {text} NOT NULL,
        revoked_at {text}
    )
    """,
)

# Terms are separated by spaces and hold no other ASCII than letters and digits; the `ascii` tokenizer takes every other
# character for a letter, so that it sees exactly our terms. Queries ask for single terms, so no positions are kept.
SQLITE = (
    """
    CREATE VIRTUAL TABLE memory_index USING fts5(
        owner, terms, content='memories', content_rowid='number', tokenize='ascii', detail='column', columnsize=0
    )
    """,
    """
    CREATE TRIGGER memories_inserted AFTER INSERT ON memories BEGIN
        INSERT INTO memory_index (rowid, owner, terms) VALUES (new.number, new.owner, new.terms);
    END
    """,
    """
    CREATE TRIGGER memories_deleted AFTER DELETE ON memories BEGIN
        INSERT INTO memory_index (memory_index, rowid, owner, terms)
            VALUES ('delete', old.number, old.owner, old.terms);
    END
    """,
    """
    CREATE TRIGGER memories_updated AFTER UPDATE OF owner, terms ON memories BEGIN
        INSERT INTO memory_index (memory_index, rowid, owner, terms)
            VALUES ('delete', old.number, old.owner, old.terms);
        INSERT INTO memory_index (rowid, owner, terms) VALUES (new.number, new.owner, new.terms);
    END
    """,
)

# array_to_tsvector takes our terms as they are, where to_tsvector would cut them again by rules of its own.
POSTGRESQL = (
    """
    ALTER TABLE memories ADD COLUMN search tsvector
        GENERATED ALWAYS AS (array_to_tsvector(string_to_array(rtrim('=' || owner || ' ' || terms), ' '))) STORED
    """,
    "CREATE INDEX memories_by_terms ON memories USING gin (search)",
)
