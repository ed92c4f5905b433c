"""Full-text search over memories: candidates from the database's index, ranked here, so that both databases agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

from sqlalchemy import Connection

from .prepared import rows_of_text
from .rows import Scope
from .schema import owner_values, storable
from .search_terms import owner_term

MAX_CANDIDATES = 200
_LEAST_A_TERM = 10
_SATURATION = 1.2  # BM25's k1 and b, as FTS5 and most others have them
_LENGTH_WEIGHT = 0.75

# Each term's newest matches, so that a common word cannot crowd out a rare one. The owner is part of what is looked up
# in the index; the columns of what is found are compared as well, because a hash is no proof. `+ 0` keeps PostgreSQL
# from walking the primary key backwards instead of asking the index, and the first `+` SQLite from another index.
_MINE = "m.tenant_id = :tenant_id AND m.user_id = :user_id AND m.agent_id = :agent_id"
_ONE_TERM = {
    "sqlite": """
        SELECT * FROM (
            SELECT rowid FROM memory_index WHERE memory_index MATCH :match_{at} ORDER BY rowid DESC LIMIT :most_{at}
        )""",
    "postgresql": f"""
        (
            SELECT m.number FROM memories m
            WHERE m.search @@ CAST(:match_{{at}} AS tsquery) AND {_MINE}
            ORDER BY m.number + 0 DESC LIMIT :most_{{at}}
        )""",
}
_MINE_OF_THESE = {"sqlite": _MINE.replace("m.tenant_id", "+m.tenant_id"), "postgresql": _MINE}
_NOT_INDEXED = f"""
    SELECT m.number, m.terms FROM memories m
    WHERE {_MINE} AND m.number > (SELECT upto FROM memories_indexed) ORDER BY m.number DESC
"""


def select_candidates(c: Connection, scope: Scope, terms: Sequence[str]) -> list[tuple[int, str]]:
    """Numbers and terms of memories with at least one of the terms."""
    dialect = c.dialect.name
    # Terms have letters, digits and marks only (search_terms), so that these quotes cannot be left.
    form = "'={}' & '{}'" if dialect == "postgresql" else 'owner : "{}" AND terms : "{}"'
    owner = owner_term(scope)
    mine = {name: storable(value) for name, value in owner_values(scope).items()}
    left = dict.fromkeys(terms, max(_LEAST_A_TERM, MAX_CANDIDATES // len(terms)))
    found = _not_indexed(c, mine, left) if dialect == "sqlite" else []
    values: dict[str, str | int] = {f"match_{at}": form.format(owner, term) for at, term in enumerate(terms)}
    values |= {f"most_{at}": left[term] for at, term in enumerate(terms)}
    one_term = _ONE_TERM[dialect]
    numbers = " UNION ALL ".join([one_term.format(at=at) for at in range(len(terms))])
    indexed = f"SELECT m.number, m.terms FROM memories m WHERE m.number IN ({numbers}) AND {_MINE_OF_THESE[dialect]}"
    return found + [(number, kept) for number, kept in rows_of_text(c, indexed, values | mine)]


def _not_indexed(c: Connection, mine: Mapping[str, str], left: dict[str, int]) -> list[tuple[int, str]]:
    """Those that SQLite's index does not have yet (``version_5``), the newest: as many of each term as are ``left``.

    What of each is left then is written there.
    """
    found: list[tuple[int, str]] = []
    for number, kept in rows_of_text(c, _NOT_INDEXED, mine):
        spaced = f" {kept} "
        having = [term for term in left if f" {term} " in spaced]
        if any(left[term] > 0 for term in having):
            found.append((number, kept))
        for term in having:
            left[term] = max(0, left[term] - 1)
    return found


def rank(terms: Sequence[str], found: Sequence[tuple[int, str]], total: int) -> list[tuple[int, float]]:
    """Numbers and BM25 scores of what was found, best first; of equal ones the newest.

    ``total`` is how many memories there are; how many have a term is counted among those found.
    """
    if not found:
        return []
    # Without a call for each term of each memory: those took as long as all the rest of a search.
    counted: list[tuple[int, int, dict[str, int]]] = []
    having = dict.fromkeys(terms, 0)
    words = 0
    for number, kept in found:
        kept_terms = kept.split(" ")
        words += len(kept_terms)
        times: dict[str, int] = {}
        for term in filter(having.__contains__, kept_terms):
            if term in times:
                times[term] += 1
            else:
                times[term] = 1
                having[term] += 1
        counted.append((number, len(kept_terms), times))
    weights = {term: _weight(having[term], total) for term in terms}
    mean_length = words / len(counted)
    scores: list[tuple[float, int]] = []
    for number, length, times in counted:
        norm = _SATURATION * (1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * length / mean_length)
        score = 0.0
        for term in terms:
            if term in times:
                score += times[term] * (_SATURATION + 1) / (times[term] + norm) * weights[term]
        scores.append((score, number))
    scores.sort(reverse=True)
    return [(number, score) for score, number in scores]


def _weight(having: int, total: int) -> float:
    """How telling a term is that so many of all memories have (BM25's idf in Lucene's form, never below zero)."""
    return log(1 + (max(total, having) - having + 0.5) / (having + 0.5))
