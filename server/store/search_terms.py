"""What a text is found by: its words, and for scripts without spaces between words, its pairs of characters.

The terms are ours, so that both databases index and find the same: neither cuts or folds a text by rules of its own. A
term is letters, digits and marks only; nothing that a user types can be syntax of a query.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Literal, TypeAlias

from .rows import Scope
from .schema import storable

MAX_INDEXED_CHARS = 20_000
"""Characters of a memory that it is found by; more of it is kept but not searched."""
MAX_QUERY_TERMS = 32
MAX_TERM_CHARS = 64

_Kind: TypeAlias = Literal["word", "unspaced"] | None

_ASCII_WORDS = re.compile("[0-9a-z]+").findall
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1100, 0x11FF),  # Hangul Jamo
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # CJK radicals
    (0x3005, 0x3007),  # 々〆〇
    (0x3040, 0x318F),  # Kana, Bopomofo, Hangul compatibility
    (0x31A0, 0x31FF),  # Bopomofo and Kana extensions
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA960, 0xA97F),  # Hangul
    (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF),  # Han
    (0x1AFF0, 0x1B16F),  # Kana
    (0x20000, 0x3FFFF),  # Han
)

STOP_WORDS = frozenset(
    "a about am an and any are as at be been but by can could d did do does for from had has have he her him his how i"  # noqa: SIM905
    " if in is it its just ll m me my no not of on or our out re s she should so some t that the their them then there"
    " these they this to up us ve was we were what when where which who why will with would you your".split()
)
"""English words that say nothing of what is meant; a query leaves them out when it has others."""


def index_terms(text: str) -> list[str]:
    """The terms of a memory, in order, each as often as it is there."""
    return [term for term, _ in _terms(text[:MAX_INDEXED_CHARS])]


def query_terms(text: str) -> list[str]:
    """The terms that a query asks for: each once, at most ``MAX_QUERY_TERMS``; empty if there is nothing to ask.

    Of a run of characters without spaces these are the pairs; the single character only where it stands alone.
    """
    asked = list(dict.fromkeys(term for term, telling in _terms(text[:MAX_INDEXED_CHARS]) if telling))
    return ([term for term in asked if term not in STOP_WORDS] or asked)[:MAX_QUERY_TERMS]


def owner_term(scope: Scope) -> str:
    """One term for all memories of a scope, so that the index itself keeps the owners apart."""
    ids = (storable(scope.tenant_id), storable(scope.user_id), storable(scope.agent_id))
    return hashlib.sha256("\0".join(ids).encode()).hexdigest()[:32]


def _terms(text: str) -> Iterator[tuple[str, bool]]:
    """Each term, and whether a query should ask for it."""
    if text.isascii():  # 4 times as fast for what most are
        for word in _ASCII_WORDS(text.lower()):
            yield word[:MAX_TERM_CHARS], True
        return
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    for kind, characters in groupby(folded[:MAX_INDEXED_CHARS], _kind):
        run = "".join(characters)
        if kind == "word":
            yield run[:MAX_TERM_CHARS], True
        elif kind == "unspaced":
            for at, character in enumerate(run):
                yield character, len(run) == 1
                if at + 1 < len(run):
                    yield run[at : at + 2], True


@lru_cache(maxsize=65_536)
def _kind(character: str) -> _Kind:
    if unicodedata.category(character)[0] not in "LNM":
        return None
    number = ord(character)
    return "unspaced" if any(first <= number <= last for first, last in _UNSPACED) else "word"
