"""The store: agents, sessions, messages, memories, working memory, runs and API keys, by SQLAlchemy Core."""
