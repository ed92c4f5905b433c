"""Token counts: the vendor's where it gives them, else an estimate that says it is one."""

from __future__ import annotations

import msgspec

from .events import Usage
from .pieces import UsagePiece
from .provider import ModelRequest

CHARS_PER_TOKEN = 4
"""English text in the tokenizers of the day; a CJK character is about one token of its own."""

_NOT_WIDE = bytes(range(0x2E)) + bytes(range(0xDC, 0xE0))
"""High bytes of the UTF-16 units that are no wide character: those below U+2E00, and second surrogates."""


def estimate_tokens(text: str) -> int:
    """About how many tokens the text is: one for each CJK character, one for each four of the others.

    Counts in bytes, not in a loop: it runs while nothing else does, on answers of megabytes.
    """
    if text.isascii():
        return -(-len(text) // CHARS_PER_TOKEN)
    high_bytes = text.encode("utf-16-le", "surrogatepass")[1::2]
    wide = len(high_bytes.translate(None, _NOT_WIDE))
    return wide - (-(len(text) - wide) // CHARS_PER_TOKEN)


def reported_usage(piece: UsagePiece) -> Usage:
    """The vendor's counts as the run's usage."""
    return Usage(
        piece.input_tokens,
        piece.output_tokens,
        piece.reasoning_tokens,
        piece.cached_tokens,
    )


def add_usage(before: Usage | None, more: Usage) -> Usage:
    """What the steps before have used, and this one: a run's tokens are those of all its model calls."""
    if before is None:
        return more
    return Usage(
        before.input_tokens + more.input_tokens,
        before.output_tokens + more.output_tokens,
        _add(before.reasoning_tokens, more.reasoning_tokens),
        _add(before.cached_tokens, more.cached_tokens),
        estimated=before.estimated or more.estimated,
    )


def _add(before: int | None, more: int | None) -> int | None:
    return more if before is None else before + (more or 0)


def estimated_usage(request: ModelRequest, response: str, reasoning: str = "", reported: Usage | None = None) -> Usage:
    """What an answer that is not complete cost (a stopped stream gets no figures: openai-openapi#539).

    Reasoning counts as output too, as the vendors bill it. What the vendor ``reported`` on the way stands, unless it
    knew of less output than has come since (Anthropic reports once before the first token).
    """
    thought = estimate_tokens(reasoning)
    output = estimate_tokens(response) + thought
    if reported is None:
        sent = sum(estimate_tokens(message.content) for message in request.messages)
        return Usage(sent, output, reasoning_tokens=thought or None, estimated=True)
    if reported.output_tokens >= output:
        return reported
    return msgspec.structs.replace(reported, output_tokens=output, estimated=True)
