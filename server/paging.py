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

    def page(self, items: list[ItemT], total: int) -> Page[ItemT]:
        """The part that was found, of a list with so many items."""
        return Page(items=items, total=total, limit=self.limit, offset=self.offset)


class Page(msgspec.Struct, Generic[ItemT], frozen=True, kw_only=True):
    """Part of a list.

    Attributes:
        total: how many items the whole list has.
    """

    items: list[ItemT]
    total: int
    limit: int
    offset: int
