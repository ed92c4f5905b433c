"""``lumos keys``: make, list and revoke API keys."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from .cli_support import database_option, give_up, option, run

if TYPE_CHECKING:
    from .store.database import Database


_KEY = "LUMOS_KEY_"


@click.group()
def keys() -> None:
    """Make, list and revoke API keys. Without any, a server is for its own user alone."""


@keys.command()
@database_option
@option("--tenant", prefix=_KEY, required=True, help="Whose agents and memories the key is for.")
@option("--user", prefix=_KEY, required=True, help="Which of the tenant's users.")
@option("--admin", prefix=_KEY, is_flag=True, help="May act for all users of the tenant and change its agents.")
@option("--name", prefix=_KEY, default="", help="What it is for, to tell keys apart.")
@option(
    "--requests-per-minute", prefix=_KEY, type=click.IntRange(min=1), help="Requests in a minute.  [default: no limit]"
)
@option("--concurrent-runs", prefix=_KEY, type=click.IntRange(min=1), help="Runs at once.  [default: no limit]")
@option("--tokens-per-day", prefix=_KEY, type=click.IntRange(min=1), help="Tokens in a day (UTC).  [default: no limit]")
def create(database_url: str, tenant: str, user: str, admin: bool, name: str, **limits: int | None) -> None:
    """Make a key and print it, once. Only its hash is kept."""
    from .keys import show_new_key
    from .principal import KeyLimits

    chosen = KeyLimits(**{limit: value for limit, value in limits.items() if value is not None})
    with _database(database_url) as database:
        try:
            run(show_new_key, database, tenant, user, admin, name, chosen, _now())
        except ValueError as error:
            give_up(str(error))


@keys.command("list")
@database_option
@option("--tenant", prefix=_KEY, help="Of this tenant alone.")
def list_keys(database_url: str, tenant: str | None) -> None:
    """List the keys; their secrets are nowhere."""
    from .keys import show_keys

    with _database(database_url) as database:
        run(show_keys, database, tenant)


@keys.command()
@database_option
@click.argument("key_id")
def revoke(database_url: str, key_id: str) -> None:
    """Revoke the key KEY_ID: servers refuse it within 5 s."""
    from .keys import show_revoked

    with _database(database_url) as database:
        revoked = run(show_revoked, database, key_id, _now())
    sys.exit(0 if revoked else 1)


@contextmanager
def _database(url: str) -> Iterator[Database]:
    """The database, open for one command."""
    from .store.database import Database
    from .store.errors import DatabaseError

    try:
        database = Database.open(url)
    except DatabaseError as error:
        give_up(str(error))
    with closing(database):
        yield database


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
