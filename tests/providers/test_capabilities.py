"""What the vendors' table claims is backed by answers that stream it and requests that ask for it; the README's too."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engine.pieces import Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest, ToolSpec
from providers.vendors import VENDORS, Capability, Vendor
from providers.wire import Endpoint
from tests.providers import wire_cases
from tests.providers.wire_cases import WireCase

README = Path(__file__).parents[2] / "README.md"
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
IMAGE = "https://example.org/cat.png"
STREAMED: dict[Capability, type[Piece]] = {"tools": ToolCallPiece, "reasoning": ReasoningPiece, "usage": UsagePiece}
CLAIMS = [(name, capability) for name, vendor in VENDORS.items() for capability in sorted(vendor.capabilities)]


def cases_of(vendor: Vendor) -> Iterator[WireCase]:
    """The cases in the vendor's wire format."""
    for module in pkgutil.iter_modules(wire_cases.__path__):
        for case in importlib.import_module(f"{wire_cases.__name__}.{module.name}").CASES:
            if isinstance(vendor.wire, type(case.wire)):
                yield case


def streams(vendor: Vendor, kind: type[Piece]) -> bool:
    """Whether some answer in the vendor's format brings such a piece."""
    return any(isinstance(piece, kind) for case in cases_of(vendor) for piece in case.pieces)


def body_of(vendor: Vendor, request: ModelRequest) -> bytes:
    """The request's body as the vendor gets it."""
    return vendor.wire.request(request, Endpoint("https://h", "key")).content


def asks_for(vendor: Vendor, capability: Capability) -> bool:
    """Whether a request can ask for it: the schema, the image's URL or the tool is in the body."""
    hello = ModelRequest((Message("user", "Hi"),), vendor.default_model or "m")
    tool = ToolSpec("look_up", "Looks up.", SCHEMA)
    match capability:
        case "schema":
            return b'"required":["answer"]' in body_of(vendor, msgspec.structs.replace(hello, response_schema=SCHEMA))
        case "images":
            request = msgspec.structs.replace(hello, messages=(Message("user", "Hi", images=(IMAGE,)),))
            return IMAGE.encode() in body_of(vendor, request)
        case "tools":
            return b"look_up" in body_of(vendor, msgspec.structs.replace(hello, tools=(tool,)))
        case _:
            return True


@pytest.mark.parametrize(("name", "capability"), CLAIMS)
def test_a_claim_is_backed_by_an_answer_and_a_request(name: str, capability: Capability) -> None:
    vendor = VENDORS[name]
    assert asks_for(vendor, capability)
    assert capability not in STREAMED or streams(vendor, STREAMED[capability])


@pytest.mark.parametrize("name", VENDORS)
def test_every_vendor_streams_text_and_usage(name: str) -> None:
    assert streams(VENDORS[name], TextPiece)
    assert "usage" in VENDORS[name].capabilities


def readme_table() -> str:
    """The README's table of providers, made from the registry."""
    mark = {True: "yes", False: "no"}
    columns: list[Capability] = ["tools", "reasoning", "usage", "schema", "images"]
    lines = ["| provider | text | tools | reasoning | usage | schema | images |", "|---|---|---|---|---|---|---|"]
    for name, vendor in VENDORS.items():
        cells = [mark[column in vendor.capabilities] for column in columns]
        lines.append(f"| `{name}` | yes | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_readmes_table_is_the_registrys() -> None:
    assert readme_table() in README.read_text(encoding="utf-8")
