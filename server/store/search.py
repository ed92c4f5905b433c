"""Full-text search over memories: candidates from the database's index, ranked here, so that both databases agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import log

from sqlalchemy import Connection

from .prepared import rows_of_text
from .rows import Scope
from .schema import storable
from .search_terms import owner_term

MAX_CANDIDATES = 200
_LEAST_A_TERM = 10
_SATURATION = 1.2  # BM25's k1 and b, as FTS5 and most others have them
_LENGTH_WEIGHT = 0.75

# Each term's newest matches, so that a common word cannot crowd out a rare one. The owner is part of what is looked up
# in the index; the joined columns are compared as well, because a hash is no proof. `+ 0` keeps PostgreSQL from walking
# the primary key backwards instead of asking the index.
_ONE_TERM = {
    "sqlite": """
        SELECT * FROM (
            SELECT m.number AS number FROM memory_index JOIN memories m ON m.number = memory_index.rowid
            WHERE memory_index MATCH :match_{at} AND {mine}
            ORDER BY memory_index.rowid DESC LIMIT :most
        )""",
    "postgresql": """
        (
            SELECT m.number AS number FROM memories m
            WHERE m.search @@ CAST(:match_{at} AS tsquery) AND {mine}
            ORDER BY m.number + 0 DESC LIMIT :most
        )""",
}
_MINE = "m.tenant_id = :tenant_id AND m.user_id = :user_id AND m.agent_id = :agent_id"


def select_candidates(c: Connection, scope: Scope, terms: Sequence[str]) -> list[tuple[int, str]]:
    """Numbers and terms of memories with at least one of the terms."""
    owner = owner_term(scope)
    # Terms have letters, digits and marks only (search_terms), so that these quotes cannot be left.
    form = "'={}' & '{}'" if c.dialect.name == "postgresql" else 'owner : "{}" AND terms : "{}"'
    values: dict[str, str | int] = {
        "tenant_id": storable(scope.tenant_id),
        "user_id": storable(scope.user_id),
        "agent_id": storable(scope.agent_id),
        "most": max(_LEAST_A_TERM, MAX_CANDIDATES // len(terms)),
    }
    values |= {f"match_{at}": form.format(owner, term) for at, term in enumerate(terms)}
    one_term = _ONE_TERM[c.dialect.name]
    numbers = " UNION ".join(one_term.format(at=at, mine=_MINE) for at in range(len(terms)))
    statement = f"SELECT number, terms FROM memories WHERE number IN ({numbers})"
    return [(number, kept) for number, kept in rows_of_text(c, statement, values)]


def rank(terms: Sequence[str], found: Sequence[tuple[int, str]], total: int) -> list[tuple[int, float]]:
    """Numbers and BM25 scores of what was found, best first; of equal ones the newest.

    ``total`` is how many memories there are; how many have a term is counted among those found.
    """
    if not found:
        return []
    wanted = frozenset(terms)
    counted = [(number, kept.count(" ") + 1, _times(kept, wanted)) for number, kept in found]
    mean_length = sum(length for _, length, _ in counted) / len(counted)
    having = Counter(term for _, _, times in counted for term in times)
    weights = {term: _weight(having[term], total) for term in terms}
    scores = [
        (number, sum(_gain(times[term], length / mean_length) * weights[term] for term in terms if term in times))
        for number, length, times in counted
    ]
    return sorted(scores, key=lambda scored: (-scored[1], -scored[0]))


def _times(kept: str, wanted: frozenset[str]) -> Mapping[str, int]:
    """How often a memory has which of the terms."""
    times: dict[str, int] = {}
    for term in filter(wanted.__contains__, kept.split(" ")):
        times[term] = times.get(term, 0) + 1
    return times


def _weight(having: int, total: int) -> float:
    """How telling a term is that so many of all memories have (BM25's idf in Lucene's form, never below zero)."""
    return log(1 + (max(total, having) - having + 0.5) / (having + 0.5))


def _gain(times: int, length: float) -> float:
    """What a term that is there so often adds; ``length`` of the memory against the mean."""
    return times * (_SATURATION + 1) / (times + _SATURATION * (1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * length))
