"""Models behind their wire formats: vendors over HTTP, and the replay of recordings."""
