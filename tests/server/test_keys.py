"""Keys: what they are made of, and what ``lumos keys`` says; with a real database in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path

import msgspec
import pytest

from server.keys import hash_secret, make_key, parse_key, show_keys, show_new_key, show_revoked
from server.principal import KeyLimits
from server.store import keys as key_rows
from server.store.database import Database
from server.store.rows import StoredKey
from tests.server.commands import complaint, lumos

NOW = "2026-11-22T12:00:00.000000+00:00"
LATER = "2026-11-23T08:30:00.000000+00:00"
NO_LIMITS = KeyLimits()


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database.open("sqlite://", inline=True)
    yield database
    database.close()


def a_key(limits: KeyLimits = NO_LIMITS) -> tuple[StoredKey, str]:
    return make_key("acme", "ada@acme.example", True, "laptop", limits, NOW)


# What keys are made of


def test_a_key_is_its_id_and_a_secret_of_which_only_the_hash_is_kept() -> None:
    stored, text = a_key()
    match = re.fullmatch(r"lumos_([A-Za-z0-9]{16})_([A-Za-z0-9_-]{43})", text)
    assert match
    assert stored == StoredKey(
        key_id=match[1],
        tenant_id="acme",
        user_id="ada@acme.example",
        admin=True,
        name="laptop",
        secret_hash=hashlib.sha256(match[2].encode()).digest(),
        limits=NO_LIMITS,
        created_at=NOW,
        revoked_at=None,
    )
    assert match[2] not in repr(stored)


def test_keys_are_different() -> None:
    keys = [a_key() for _ in range(500)]
    assert len({stored.key_id for stored, _ in keys}) == len({stored.secret_hash for stored, _ in keys}) == 500
    assert {character for stored, _ in keys for character in stored.key_id}.isdisjoint("_-")


def test_every_key_that_is_made_can_be_parsed() -> None:
    """The secret may hold and begin with underscores, as the separator is one."""
    for _ in range(500):
        stored, text = a_key()
        presented = parse_key(text)
        assert presented is not None
        assert presented.key_id == stored.key_id
        assert presented.opens(stored.secret_hash)
        assert not presented.opens(a_key()[0].secret_hash)
    tricky = parse_key(f"lumos_{'a' * 16}_{'_' * 43}")
    assert tricky is not None
    assert tricky.opens(hash_secret("_" * 43))


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a/b", "a\n", "日本", "a" * 201, "a;b", "\x1b[31m", "..\\a"], ids=repr
)
def test_what_cannot_be_a_tenant_or_a_user_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^the tenant .* is not 1 to 200 letters"):
        make_key(name, "u", False, "", NO_LIMITS, NOW)
    with pytest.raises(ValueError, match=r"^the user .* is not 1 to 200 letters"):
        make_key("t", name, False, "", NO_LIMITS, NOW)


@pytest.mark.parametrize("name", ["a", "A-1", "ada@acme.example", "urn:acme:7", "a+b", "x_y", "-", "a" * 200])
def test_ids_and_mail_addresses_are_names(name: str) -> None:
    assert make_key(name, name, False, "", NO_LIMITS, NOW)[0].user_id == name


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e", "x" * 201], ids=repr)
def test_a_name_that_a_terminal_would_read_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name is not up to 200 printable characters"):
        make_key("t", "u", False, name, NO_LIMITS, NOW)


@pytest.mark.parametrize("limit", [0, -1, 0.5, nan, -inf])
@pytest.mark.parametrize("field", KeyLimits.__struct_fields__)
def test_a_limit_below_1_is_refused(field: str, limit: float) -> None:
    with pytest.raises(ValueError, match=f"{field.replace('_', ' ')} is {limit:g}; it is to be at least 1"):
        a_key(KeyLimits(**{field: limit}))


def test_limits_survive_json() -> None:
    limits = KeyLimits(tokens_per_day=10**15)
    encoded = msgspec.json.encode(limits)
    assert encoded == b'{"tokens_per_day":1000000000000000}'
    assert msgspec.json.decode(encoded, type=KeyLimits) == limits


# What the command says


async def test_create_prints_the_key_alone_and_once(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    limits = KeyLimits(requests_per_minute=60, tokens_per_day=1_000_000)
    await show_new_key(database, "acme", "ada", True, "laptop", limits, NOW)
    said = capsys.readouterr()
    presented = parse_key(said.out.removesuffix("\n"))
    assert presented is not None
    assert presented.secret not in said.err
    first, last = said.err.splitlines()
    about = "tenant acme, admin ada; 60 requests/min, 1000000 tokens/day"
    assert first == f"Key {presented.key_id} ({about}) is in sqlite://. This is its only showing:"
    assert last == "It is the server's first: requests need a key from now on, in 5 s at the latest."
    stored = await database.read(key_rows.find_key, presented.key_id)
    assert stored is not None
    assert presented.opens(stored.secret_hash)
    assert (stored.limits, stored.created_at, stored.admin) == (limits, NOW, True)


async def test_the_second_key_changes_nothing_for_others(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    await show_new_key(database, "acme", "ada", False, "", NO_LIMITS, NOW)
    capsys.readouterr()
    await show_new_key(database, "acme", "bob", False, "", NO_LIMITS, NOW)
    (line,) = capsys.readouterr().err.splitlines()
    assert "(tenant acme, user bob; no limits)" in line


async def test_a_refused_key_is_not_kept(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the user"):
        await show_new_key(database, "acme", "", False, "", NO_LIMITS, NOW)
    assert capsys.readouterr() == ("", "")
    assert await database.read(key_rows.list_keys, None) == []


async def test_list_shows_everything_but_secrets(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    limits = KeyLimits(concurrent_runs=2)
    ada = make_key("acme", "ada", True, "laptop", limits, NOW)[0]
    bob = make_key("acme", "bob", False, "", NO_LIMITS, LATER)[0]
    eve = make_key("other", "eve", False, "", NO_LIMITS, NOW)[0]
    for key in (ada, bob, eve):
        await database.write(key_rows.create_key, key)
    await show_revoked(database, bob.key_id, LATER)
    capsys.readouterr()
    await show_keys(database, "acme")
    said = capsys.readouterr()
    heading, first, second = said.out.splitlines()
    assert heading.split() == ["key", "id", "tenant", "user", "admin", "limits", "created", "revoked", "name"]
    assert re.split(r" {2,}", first) == [
        ada.key_id, "acme", "ada", "yes", "2 runs at once", "2026-11-22T12:00:00", "no", "laptop",
    ]  # fmt: skip
    assert re.split(r" {2,}", second) == [
        bob.key_id, "acme", "bob", "no", "no limits", "2026-11-23T08:30:00", "2026-11-23T08:30:00",
    ]  # fmt: skip
    assert heading.index("tenant") == first.index("acme") == second.index("acme"), "aligned"
    assert said.err == ""
    await show_keys(database)
    everybody = capsys.readouterr().out
    assert "eve" in everybody
    for key in (ada, bob, eve):
        assert key.secret_hash.hex() not in everybody


async def test_an_empty_list_says_what_that_means(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    await show_keys(database)
    assert capsys.readouterr() == ("", "There are no keys: a server is for its own user alone, on loopback.\n")
    await show_keys(database, "acme")
    assert capsys.readouterr() == ("", "There are no keys of tenant 'acme'.\n")


async def test_revoke_says_what_became_of_the_key(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    key, _ = a_key()
    await database.write(key_rows.create_key, key)
    assert await show_revoked(database, key.key_id, LATER)
    assert capsys.readouterr() == ("", f"Key {key.key_id} is revoked: servers refuse it in 5 s at the latest.\n")
    assert await show_revoked(database, key.key_id, "2027-01-01T00:00:00.000000+00:00")
    assert capsys.readouterr().err == f"Key {key.key_id} was revoked already, at 2026-11-23T08:30:00.\n"
    stored = await database.read(key_rows.find_key, key.key_id)
    assert stored is not None
    assert stored.revoked_at == LATER
    assert not await show_revoked(database, "nobody", LATER)
    assert capsys.readouterr().err == "lumos: there is no key 'nobody'; `lumos keys list` shows them\n"


# Which database


def test_create_names_the_database_and_says_that_it_is_new(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    create = ("keys", "create", "--tenant", "acme", "--user", "ada", "--database-url", f"sqlite:///{file}")
    assert f" is in the new database {file}. This" in lumos(*create).stderr
    assert f" is in the database {file}. This" in lumos(*create).stderr


@pytest.mark.parametrize("words", [("list",), ("revoke", "abc")])
def test_list_and_revoke_make_no_database(words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "lmos.db"
    said = complaint(lumos("keys", *words, "--database-url", f"sqlite:///{file}"))
    assert said == f"there is no database {file}: name the server's with --database-url or LUMOS_DATABASE_URL"
    assert list(tmp_path.iterdir()) == []


def test_keys_of_a_url_that_is_none_is_one_line() -> None:
    assert "this is no database URL" in complaint(lumos("keys", "list", "--database-url", "nonsense"))
