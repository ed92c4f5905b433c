"""A model server in memory: answers as a vendor would, on the vendor's own address, and keeps what it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import trio

from providers.encoders import MOCKED_VENDORS
from providers.vendors import ALIASES, VENDORS

from .answers import ModelAnswer, Unreachable, acts_of
from .memory_connection import Address, MemoryStream
from .vendor_bytes import play, read_request


@dataclass
class ModelCall:
    """One request that a model server got.

    Attributes:
        path, headers, body: of the request; header names in lower case, ``body`` is its JSON.
        asked_at: on trio's clock.
        answered: whether it got its whole answer.
    """

    path: str
    headers: Mapping[str, str]
    body: Any
    asked_at: float
    stream: MemoryStream
    answered: bool = False

    @property
    def closed_at(self) -> float | None:
        """When whoever asked closed the connection, on trio's clock; None if it is open."""
        return self.stream.connection.client.closed_at

    @property
    def under_way(self) -> bool:
        """Whether whoever asked still waits for more."""
        return not self.answered and self.closed_at is None


class ModelServer:
    """Answers the n-th request with the n-th answer, all further ones with the last.

    Attributes:
        url: the base URL that a provider has to have.
        calls: what it was asked, oldest first.
    """

    def __init__(self, provider: str, answers: Sequence[ModelAnswer], url: str | None = None) -> None:
        """``provider`` is a name of ``lumos providers``; ``url`` by default the vendor's own.

        Raises:
            ValueError: no answer is given, there is no such provider, or it has no URL of its own.
        """
        provider = ALIASES.get(provider, provider)
        if provider not in MOCKED_VENDORS:
            raise ValueError(f"there is no provider {provider!r}; there are: {', '.join(MOCKED_VENDORS)}")
        if not answers:
            raise ValueError("give the model at least one answer, as replay.text('...')")
        url = url or VENDORS[provider].base_url
        if url is None:
            raise ValueError(f"{provider} has no URL of its own: give one")
        self.url = url
        self.calls: list[ModelCall] = []
        self._answers = tuple(answers)
        self._given = 0
        self._wire = MOCKED_VENDORS[provider].format

    @property
    def address(self) -> Address:
        """Where it listens."""
        url = httpx.URL(self.url)
        return url.host, url.port or (443 if url.scheme == "https" else 80)

    async def admit(self) -> None:
        """Let somebody connect, for the next request.

        Raises:
            ConnectionRefusedError: that is what the next answer says. Waits for ever if it says so.
        """
        match self._next():
            case Unreachable("refuse"):
                self._given += 1
                raise ConnectionRefusedError("refused by a test")
            case Unreachable():
                self._given += 1
                await trio.sleep_forever()

    async def serve(self, listener: trio.abc.Listener[Any]) -> None:
        """Answer until cancelled."""
        await trio.serve_listeners(self._serve_connection, [listener])

    def _next(self) -> ModelAnswer:
        return self._answers[min(self._given, len(self._answers) - 1)]

    async def _serve_connection(self, stream: MemoryStream) -> None:
        # A client that has gone is no fault here: what a test looks at is the client's side.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while request := await read_request(stream):
                if isinstance(self._next(), Unreachable):  # the request is to come again, on a connection of its own
                    break
                await self._answer(request, stream)
        await trio.aclose_forcefully(stream)

    async def _answer(self, request: bytes, stream: MemoryStream) -> None:
        given = self._next()
        self._given += 1
        call = _call(request, stream)
        self.calls.append(call)
        asked = call.body if isinstance(call.body, dict) else {}
        await play(stream, acts_of(given, self._wire, asked, f"lumos{self._given:08}"))
        call.answered = True


def _call(request: bytes, stream: MemoryStream) -> ModelCall:
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    return ModelCall(first.split(" ")[1], headers, msgspec.json.decode(body), trio.current_time(), stream)
