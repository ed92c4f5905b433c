"""Who asks: the tenant and the user behind a request, and how much they may ask for."""

from __future__ import annotations

import re
from math import inf

import msgspec

LOCAL = "local"
"""Tenant and user of a server without keys."""

NAME = r"[A-Za-z0-9@._:+-]{1,200}"
"""What tenants and users can be called: ids and mail addresses, nothing that a path, a log or a terminal would read."""

_NAME = re.compile(NAME)


def is_name(text: str) -> bool:
    """Whether a tenant or a user can be called so."""
    return _NAME.fullmatch(text) is not None


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one API key may use; ``inf`` is without limit, and left out of JSON, which has no such number."""

    requests_per_minute: int | float = inf
    concurrent_runs: int | float = inf
    tokens_per_day: int | float = inf


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks.

    Attributes:
        admin: may act for every user of the tenant and change the tenant's agents.
        key_id: of the API key that said so; None for the local user, who needs none.
        limits: of that key.
        operator: the local user: decides freely where secrets go.
    """

    tenant_id: str
    user_id: str
    admin: bool = False
    key_id: str | None = None
    limits: KeyLimits = KeyLimits()

    @property
    def operator(self) -> bool:
        """Whether this is the local single user, who runs the server too."""
        return self.key_id is None

    def may_see(self, tenant_id: str, user_id: str) -> bool:
        """Whether a thing of that tenant and user is this one's to see."""
        return self.tenant_id == tenant_id and (self.admin or self.user_id == user_id)


LOCAL_USER = Principal(tenant_id=LOCAL, user_id=LOCAL, admin=True)
