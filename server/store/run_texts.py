"""What runs' rows hold of their answers, and how that is dropped."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, case, update

from .schema import runs

_DROPPED = ""
"""In the row of a run under way: nothing that it says is to be kept there. Else such a row has NULL."""


def drop_responses(c: Connection, which: ColumnElement[bool]) -> None:
    """Drop the answers of these runs (a condition on ``runs``), also what those under way are still going to say."""
    c.execute(update(runs).where(which).values(response=case((runs.c.status == "running", _DROPPED), else_=None)))


def drop_response(c: Connection, run_id: str) -> None:
    """Drop the answer of this run; of an unknown one, nothing."""
    drop_responses(c, runs.c.run_id == run_id)


def kept_response(response: ColumnElement[str]) -> ColumnElement[str | None]:
    """What the row of a run that ends gets: its answer, unless that was dropped before."""
    return case((runs.c.response.is_(None), response), else_=None)
