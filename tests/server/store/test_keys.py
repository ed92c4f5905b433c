"""API keys in the store."""

from __future__ import annotations

from math import inf
from typing import Any

import msgspec
import pytest

from server.principal import KeyLimits
from server.store.database import AlreadyThereError, Database
from server.store.keys import any_keys, create_key, find_key, list_keys, revoke_key
from server.store.rows import StoredKey

from .scene import at


def key(key_id: str = "key", **fields: Any) -> StoredKey:
    plain = StoredKey(
        key_id=key_id,
        tenant_id="tenant",
        user_id="user",
        admin=False,
        name="laptop",
        secret_hash=bytes(range(32)),
        limits=KeyLimits(),
        created_at=at(1),
        revoked_at=None,
    )
    return msgspec.structs.replace(plain, **fields)


@pytest.mark.parametrize("limits", [KeyLimits(), KeyLimits(requests_per_minute=0.5, tokens_per_day=10**12)])
async def test_a_key_comes_back_as_it_was_kept(database: Database, limits: KeyLimits) -> None:
    kept = key(admin=True, limits=limits)
    await database.write(create_key, kept)
    found = await database.read(find_key, "key")
    assert found == kept
    assert found.limits.concurrent_runs == inf
    assert await database.read(find_key, "KEY") is None


async def test_an_id_is_taken_once(database: Database) -> None:
    await database.write(create_key, key())
    with pytest.raises(AlreadyThereError):
        await database.write(create_key, key(tenant_id="other"))


async def test_lists_are_of_one_tenant_or_of_all(database: Database) -> None:
    kept = [key("b"), key("a", created_at=at(2)), key("c", tenant_id="other", created_at=at(3))]
    for one in kept:
        await database.write(create_key, one)
    assert await database.read(list_keys, None) == kept
    assert await database.read(list_keys, "tenant") == kept[:2]
    assert await database.read(list_keys, "nobody") == []


async def test_a_revoked_key_is_there_but_counts_no_more(database: Database) -> None:
    assert not await database.read(any_keys)
    await database.write(create_key, key())
    assert await database.read(any_keys)
    assert await database.write(revoke_key, "key", at(2))
    assert not await database.read(any_keys)
    assert not await database.write(revoke_key, "key", at(3))
    assert not await database.write(revoke_key, "unknown", at(3))
    found = await database.read(find_key, "key")
    assert found is not None
    assert found.revoked_at == at(2)
