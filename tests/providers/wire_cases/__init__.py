"""The vendors' answers as bytes, each with the pieces it means: one module a wire format, each with its ``CASES``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ProviderErrorCode
from engine.pieces import Piece
from providers.wire import Wire


@dataclass(frozen=True)
class WireCase:
    """One answer of a vendor.

    Attributes:
        name: the vendor, and what the case shows, as ``anthropic: two tool calls``.
        wire: the adapter that is to read it.
        frames: the answer's body, frame by frame (an event with its blank line, a line with its newline), as the
            vendor's documentation or SDK shows it.
        pieces: what it means.
        error: the code that the answer ends in, after those pieces; None if it ends well.
        noise: frames that mean nothing and may come between any two others: keep-alives, unknown events and fields.
    """

    name: str
    wire: Wire
    frames: Sequence[bytes]
    pieces: Sequence[Piece]
    error: ProviderErrorCode | None = None
    noise: Sequence[bytes] = ()
