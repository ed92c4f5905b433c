"""What happened in a simulated world, in order, as text: the same seed gives the same bytes."""

from __future__ import annotations

import json
from hashlib import blake2b, sha256

import trio

SHOWN_CHARS = 200
"""Of one fact; of a longer one the beginning is shown, with a digest of the whole."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/+#")


class Trace:
    """Lines of ``seconds actor what fact=value …``; times are trio's, to the nanosecond."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, actor: str, what: str, **facts: object) -> None:
        """Add a line. Facts come in the order in which they are given."""
        shown = "".join(f" {name}={_shown(value)}" for name, value in facts.items())
        self.lines.append(f"{trio.current_time():.9f} {actor} {what}{shown}\n")

    def text(self) -> str:
        """All lines."""
        return "".join(self.lines)

    def digest(self) -> str:
        """SHA-256 of the text: two worlds with the same one went the same way."""
        return sha256(self.text().encode()).hexdigest()


def _shown(value: object) -> str:
    match value:
        case str():
            text = value
        case bytes() | bytearray():
            text = bytes(value).decode("utf-8", "backslashreplace")
        case float():
            return f"{value:.9f}"
        case _:
            text = str(value)
    if len(text) > SHOWN_CHARS:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        text = f"{text[:SHOWN_CHARS]}...{len(text)}#{digest}"
    return text if text and _PLAIN.issuperset(text) else json.dumps(text)
