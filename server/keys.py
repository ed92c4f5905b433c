"""API keys: what their text is made of, and what ``lumos keys`` does with them on the terminal."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Sequence
from math import inf

import click
import msgspec
from sqlalchemy import Connection

from .principal import KeyLimits, is_name
from .store import keys as key_rows
from .store.database import Database
from .store.rows import StoredKey

KEY_ID_CHARS = 16
SECRET_BYTES = 32
MAX_NAME_CHARS = 200

_LETTERS = string.ascii_letters + string.digits
_KEY = re.compile(r"lumos_([A-Za-z0-9]{12,32})_([A-Za-z0-9_-]{43})")
_LIMIT_WORDS = {
    "requests_per_minute": ("request", "/min"),
    "concurrent_runs": ("run", " at once"),
    "tokens_per_day": ("token", "/day"),
}
_HEADINGS = ("key id", "tenant", "user", "admin", "limits", "created", "revoked", "name")


class PresentedKey(msgspec.Struct, frozen=True):
    """A key as a client sent it; its ``repr`` leaves out the secret."""

    key_id: str
    secret: str

    def __repr__(self) -> str:
        return f"PresentedKey({self.key_id!r})"

    def opens(self, secret_hash: bytes) -> bool:
        """Whether the secret is the one of that hash; takes as long either way."""
        return hmac.compare_digest(hash_secret(self.secret), secret_hash)


def parse_key(text: str) -> PresentedKey | None:
    """The parts of a key; None if the text cannot be one."""
    match = _KEY.fullmatch(text)
    return PresentedKey(*match.groups()) if match else None


def hash_secret(secret: str) -> bytes:
    """SHA-256 of the secret: it has 256 random bits, so that a slower hash or a salt would protect nothing more."""
    return hashlib.sha256(secret.encode()).digest()


def make_key(tenant: str, user: str, admin: bool, name: str, limits: KeyLimits, now: str) -> tuple[StoredKey, str]:
    """A new key and its text, which is to be shown once and kept nowhere.

    Raises:
        ValueError: the tenant, the user, the name or a limit cannot be so; the text says which and why.
    """
    for what, text in (("tenant", tenant), ("user", user)):
        if not is_name(text):
            raise ValueError(f"the {what} {text[:100]!r} is not 1 to 200 letters, digits and @ . _ : + -")
    if len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise ValueError(f"the name is not up to {MAX_NAME_CHARS} printable characters")
    for field, limit in msgspec.structs.asdict(limits).items():
        if not limit >= 1:  # NaN too
            raise ValueError(f"{field.replace('_', ' ')} is {limit:g}; it is to be at least 1")
    key_id = "".join(secrets.choice(_LETTERS) for _ in range(KEY_ID_CHARS))
    secret = secrets.token_urlsafe(SECRET_BYTES)
    stored = StoredKey(
        key_id=key_id,
        tenant_id=tenant,
        user_id=user,
        admin=admin,
        name=name,
        secret_hash=hash_secret(secret),
        limits=limits,
        created_at=now,
        revoked_at=None,
    )
    return stored, f"lumos_{key_id}_{secret}"


async def show_new_key(
    database: Database,
    tenant: str,
    user: str,
    admin: bool,
    name: str,
    limits: KeyLimits,
    now: str,
    *,
    where: str | None = None,
) -> None:
    """Make and keep a key. Standard output gets its text alone, for a shell to take; what is said about it goes beside.

    ``where`` names the database to people; without it the database's own name does.

    Raises:
        ValueError: as ``make_key``.
    """
    key, text = make_key(tenant, user, admin, name, limits, now)
    first = await database.write(_keep, key)
    where = where or database.name
    whose = f"tenant {tenant}, {'admin' if admin else 'user'} {user}"
    click.echo(f"Key {key.key_id} ({whose}; {_limits_text(limits)}) is in {where}. This is its only showing:", err=True)
    click.echo(text)
    if first:
        click.echo("It is the server's first: requests need a key from now on, in 5 s at the latest.", err=True)


def _keep(connection: Connection, key: StoredKey) -> bool:
    first = not key_rows.any_keys(connection)
    key_rows.create_key(connection, key)
    return first


async def show_keys(database: Database, tenant: str | None = None) -> None:
    """Print the keys, of one tenant or of all. No secret is in the store, so none can be shown."""
    keys = await database.read(key_rows.list_keys, tenant)
    if not keys:
        rest = f" of tenant {tenant[:100]!r}" if tenant else ": a server is for its own user alone, on loopback"
        click.echo(f"There are no keys{rest}.", err=True)
        return
    _show_table([_HEADINGS, *map(_row, keys)])


async def show_revoked(database: Database, key_id: str, now: str) -> bool:
    """Revoke a key and say so; False if there is no such key. Servers refuse it within 5 s; its runs go on."""
    before = await database.write(_revoke, key_id, now)
    if before is None:
        click.secho(f"lumos: there is no key {key_id[:100]!r}; `lumos keys list` shows them", fg="red", err=True)
        return False
    if before.revoked_at is None:
        click.echo(f"Key {key_id} is revoked: servers refuse it in 5 s at the latest.", err=True)
    else:
        click.echo(f"Key {key_id} was revoked already, at {_to_seconds(before.revoked_at)}.", err=True)
    return True


def _revoke(connection: Connection, key_id: str, now: str) -> StoredKey | None:
    """The key as it was."""
    key = key_rows.find_key(connection, key_id)
    if key is not None and key.revoked_at is None:
        key_rows.revoke_key(connection, key_id, now)
    return key


def _row(key: StoredKey) -> tuple[str, ...]:
    return (
        key.key_id,
        key.tenant_id,
        key.user_id,
        "yes" if key.admin else "no",
        _limits_text(key.limits),
        _to_seconds(key.created_at),
        _to_seconds(key.revoked_at) if key.revoked_at else "no",
        key.name,
    )


def _limits_text(limits: KeyLimits) -> str:
    said = []
    for name, value in msgspec.structs.asdict(limits).items():
        what, how_often = _LIMIT_WORDS[name]
        if value < inf:
            said.append(f"{value:.15g} {what}{'' if value == 1 else 's'}{how_often}")
    return ", ".join(said) or "no limits"


def _to_seconds(time: str) -> str:
    return time[:19]


def _show_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.secho(line, bold=number == 0)
