"""What was asked: a request as handlers see it, whoever took it from its connection."""

from __future__ import annotations

from typing import Any, Protocol

from werkzeug.datastructures import Headers


class Asked(Protocol):
    """What handlers need of a request; Quart's is one."""

    method: str

    @property
    def headers(self) -> Headers:
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
