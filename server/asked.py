"""What was asked: a request as handlers see it, whoever took it from its connection."""

from __future__ import annotations

from typing import Any, Protocol

from werkzeug.datastructures import Headers


class PlainHeaders:
    """Headers of which none is there twice: as much of werkzeug's as handlers ask for. Names are in any case."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, str]) -> None:
        """``values`` are by names in lower case."""
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, or the default."""
        return self._values.get(name.lower(), default)

    def getlist(self, name: str) -> list[str]:
        """The value of that name, if there is one."""
        value = self._values.get(name.lower())
        return [] if value is None else [value]


class Asked(Protocol):
    """What handlers need of a request; Quart's is one."""

    method: str

    @property
    def headers(self) -> Headers | PlainHeaders:
        """By name, whatever its case."""
        ...

    @property
    def args(self) -> Any:
        """The query's parameters, a ``MultiDict``."""
        ...

    @property
    def mimetype(self) -> str:
        """Of the body, without parameters."""
        ...

    async def get_data(self, cache: bool = ...) -> Any:
        """The body."""
        ...
