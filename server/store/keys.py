"""API keys in the store: everything but the keys themselves."""

from __future__ import annotations

from math import isinf
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, exists, select, update

from server.principal import KeyLimits

from .errors import AlreadyThereError
from .rows import StoredKey
from .schema import add_row, api_keys


def create_key(c: Connection, key: StoredKey) -> None:
    """Keep a new key.

    Raises:
        AlreadyThereError: there is a key of that id.
    """
    row = msgspec.structs.asdict(key)
    # JSON has no infinity; a limit that is left out is none.
    row["limits"] = {name: value for name, value in msgspec.structs.asdict(key.limits).items() if not isinf(value)}
    if add_row(c, api_keys, row) is None:
        raise AlreadyThereError(f"there is a key {key.key_id!r} already")


def find_key(c: Connection, key_id: str) -> StoredKey | None:
    """The key of that id, revoked or not."""
    row = c.execute(select(api_keys).where(api_keys.c.key_id == key_id)).mappings().one_or_none()
    return None if row is None else _stored(row)


def list_keys(c: Connection, tenant_id: str | None) -> list[StoredKey]:
    """The tenant's keys, oldest first, revoked ones too; None lists every tenant's."""
    query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.key_id)
    if tenant_id is not None:
        query = query.where(api_keys.c.tenant_id == tenant_id)
    return [_stored(row) for row in c.execute(query).mappings()]


def revoke_key(c: Connection, key_id: str, now: str) -> bool:
    """Make the key useless from now on; False if there is none or it is already."""
    change = update(api_keys).where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None)).values(revoked_at=now)
    return c.execute(change).rowcount > 0


def any_keys(c: Connection) -> bool:
    """Whether there is any key that is not revoked."""
    return bool(c.execute(select(exists().where(api_keys.c.revoked_at.is_(None)))).scalar_one())


def _stored(row: RowMapping) -> StoredKey:
    fields: dict[str, Any] = {name: row[name] for name in row if name not in ("limits", "secret_hash")}
    limits = msgspec.convert(row["limits"], KeyLimits)
    return StoredKey(limits=limits, secret_hash=bytes(row["secret_hash"]), **fields)
