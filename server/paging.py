"""Lists in pages."""

from __future__ import annotations

from typing import Annotated, Generic, TypeVar

import msgspec
from msgspec import Meta

MAX_OFFSET = 2**31 - 1

ItemT = TypeVar("ItemT")


class PageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of a list.

    Attributes:
        limit: at most so many items.
        offset: how many items to leave out before them.
    """

    limit: Annotated[int, Meta(ge=1, le=100)] = 50
    offset: Annotated[int, Meta(ge=0, le=MAX_OFFSET)] = 0


class Page(msgspec.Struct, Generic[ItemT], frozen=True, kw_only=True):
    """Part of a list.

    Attributes:
        total: how many items the whole list has.
    """

    items: list[ItemT]
    total: int
    limit: int
    offset: int
