"""Lumos's front: HTTP and SSE, the command line, and the one place where configuration becomes a server."""
