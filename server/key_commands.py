"""``lumos keys``: make, list and revoke API keys."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_support import database_option, give_up, option, run
from .store.times import time_text

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
    file = _file(database_url)
    where = None if file is None else f"the {'' if file.exists() else 'new '}database {file}"
    with _database(database_url) as database:
        show = partial(show_new_key, where=where)
        try:
            run(show, database, tenant, user, admin, name, chosen, _now())
        except ValueError as error:
            give_up(str(error))


@keys.command("list")
@database_option
@option("--tenant", prefix=_KEY, help="Of this tenant alone.")
def list_keys(database_url: str, tenant: str | None) -> None:
    """List the keys; their secrets are nowhere."""
    from .keys import show_keys

    _require_database(database_url)
    with _database(database_url) as database:
        run(show_keys, database, tenant)


@keys.command()
@database_option
@click.argument("key_id")
def revoke(database_url: str, key_id: str) -> None:
    """Revoke the key KEY_ID: servers refuse it within 5 s."""
    from .keys import show_revoked

    _require_database(database_url)
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


def _file(url: str) -> Path | None:
    """The whole path of the database; None if it is no file of its own."""
    from .store.connecting import is_in_memory, parse_url
    from .store.errors import DatabaseError

    try:
        parsed = parse_url(url)
    except DatabaseError as error:
        give_up(str(error))
    if parsed.get_backend_name() != "sqlite" or is_in_memory(parsed) or "uri" in parsed.query:
        return None
    return Path(str(parsed.database)).absolute()


def _require_database(url: str) -> None:
    """Opening would make one, and a mistyped path would look like a server without keys."""
    file = _file(url)
    if file is not None and not file.exists():
        give_up(f"there is no database {file}: name the server's with --database-url or LUMOS_DATABASE_URL")


def _now() -> str:
    return time_text(datetime.datetime.now(datetime.UTC))
