"""Which run a client's key stands for: one for each tenant, user, agent and key, however many processes ask at once."""

from __future__ import annotations

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, delete, select, update

from .rows import Scope
from .schema import add_row, idempotency_keys, owned, owner_values, runs


class KeyClaim(msgspec.Struct, frozen=True):
    """A run that a key stands for; ``fingerprint`` is of the request that started it."""

    run_id: str
    fingerprint: bytes
    created_at: str


def find_claim(c: Connection, scope: Scope, key: str) -> KeyClaim | None:
    """What the key stands for."""
    table = idempotency_keys
    columns = select(table.c.run_id, table.c.fingerprint, table.c.created_at).where(_of(scope, key))
    row = c.execute(columns).mappings().one_or_none()
    return None if row is None else KeyClaim(**row)


def claim_key(c: Connection, scope: Scope, key: str, claim: KeyClaim, instead_of: str | None = None) -> bool:
    """Let the key stand for a run that is to start, perhaps instead of one that nobody can read any more.

    False, and nothing is changed, if somebody else was faster.
    """
    if instead_of is None:
        row = {**owner_values(scope), "key": key, **msgspec.structs.asdict(claim)}
        return add_row(c, idempotency_keys, row) is not None
    change = update(idempotency_keys).where(_of(scope, key), idempotency_keys.c.run_id == instead_of)
    return c.execute(change.values(msgspec.structs.asdict(claim))).rowcount == 1


def release_key(c: Connection, scope: Scope, key: str, run_id: str) -> None:
    """The run did not start after all: the key stands for nothing."""
    c.execute(delete(idempotency_keys).where(_of(scope, key), idempotency_keys.c.run_id == run_id))


def sweep_keys(c: Connection, before: str) -> int:
    """Drop the keys from before that time which stand for no run: those of batches; how many.

    A run's key goes with its events.
    """
    of_no_run = idempotency_keys.c.run_id.not_in(select(runs.c.run_id))
    return c.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at < before, of_no_run)).rowcount


def _of(scope: Scope, key: str) -> ColumnElement[bool]:
    return and_(owned(idempotency_keys, scope), idempotency_keys.c.key == key)
