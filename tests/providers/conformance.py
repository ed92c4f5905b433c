"""What the conformance suite is made of: the cases, one way to decode them, and ways to write the same answer anew.

A new wire format needs no test of its own here: a module in ``wire_cases/`` with ``CASES`` is found and run, and so is
every vendor of the registry.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from typing import Any, TypeAlias

import pytest

from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import Piece
from providers.vendors import VENDORS, Vendor

from . import wire_cases
from .wire_cases import WireCase

BOM = b"\xef\xbb\xbf"


def discover() -> dict[str, Sequence[WireCase]]:
    """The cases of each module in ``wire_cases/``, by the module's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(wire_cases.__path__))
    return {name: importlib.import_module(f"{wire_cases.__name__}.{name}").CASES for name in names}


BY_MODULE = discover()
CASES = [case for cases in BY_MODULE.values() for case in cases]


def one_case_a_wire() -> dict[str, WireCase]:
    """For what depends on the wire format alone: of each one the good answer with the most frames."""
    best: dict[int, tuple[str, WireCase]] = {}
    for module, cases in BY_MODULE.items():
        for case in sorted(cases, key=lambda case: (case.error is None, len(case.frames))):
            best[id(case.wire)] = (f"{module}, {type(case.wire).__name__}", case)
    return {f"{name} {number}": case for number, (name, case) in enumerate(best.values(), 1)}


WIRES = one_case_a_wire()


def case_of(vendor: Vendor) -> WireCase:
    """A good answer of a vendor of the registry; its decoder must be one that the cases show."""
    decoder = type(vendor.wire.decoder())
    shown = [case for case in WIRES.values() if type(case.wire.decoder()) is decoder]
    assert shown, f"no case in wire_cases/ is for {decoder.__name__}"
    return replace(shown[0], wire=vendor.wire)


by_vendor = pytest.mark.parametrize("case", [case_of(vendor) for vendor in VENDORS.values()], ids=VENDORS.keys())
by_wire = pytest.mark.parametrize("case", WIRES.values(), ids=WIRES.keys())
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_module = pytest.mark.parametrize("cases", BY_MODULE.values(), ids=BY_MODULE.keys())


@dataclass(frozen=True)
class Outcome:
    """What an answer came to: its pieces, and the code of the error that it ended in (None: it ended well)."""

    pieces: list[Piece]
    error: ProviderErrorCode | None


def meant(case: WireCase) -> Outcome:
    """What the case says it means."""
    return Outcome(list(case.pieces), case.error)


class Reading:
    """An answer while it is read, in the way of ``providers.http``: what comes after its end is not looked at."""

    def __init__(self, case: WireCase) -> None:
        self._decoder = case.wire.decoder()
        self._error: ProviderErrorCode | None = None
        self.pieces: list[Piece] = []

    def feed(self, read: bytes) -> None:
        """Take what one read brought."""
        if self.is_over:
            return
        try:
            self._decoder.feed(read, self.pieces)
        except ProviderError as error:
            self._error = error.code

    @property
    def is_over(self) -> bool:
        """Whether nothing that may still come is part of the answer: the vendor's end mark, or an error."""
        return self._decoder.done or self._error is not None

    @property
    def is_whole(self) -> bool:
        """Whether the end of the body, now, would make the answer a whole one."""
        return self._error is None and (self._decoder.done or self._decoder.may_end)

    @property
    def ended_by_mark(self) -> bool:
        """Whether the vendor's end mark was seen."""
        return self._decoder.done and self._error is None

    def outcome(self) -> Outcome:
        """What it came to, if the body ended now."""
        return Outcome(list(self.pieces), self._error or (None if self.is_whole else "upstream.truncated"))


def decode(case: WireCase, reads: Iterable[bytes]) -> Outcome:
    """What the reads come to, followed by the end of the body."""
    reading = Reading(case)
    for read in reads:
        reading.feed(read)
    return reading.outcome()


def is_event_stream(case: WireCase) -> bool:
    """Whether the frames are server-sent events; else they are lines."""
    return case.wire.decoder().content_type == "text/event-stream"


def body_of(case: WireCase) -> bytes:
    """The whole body."""
    return b"".join(case.frames)


def live_frames(case: WireCase) -> Sequence[bytes]:
    """The frames up to the one that decides the answer's end."""
    reading = Reading(case)
    for count, frame in enumerate(case.frames, 1):
        reading.feed(frame)
        if reading.is_over:
            return case.frames[:count]
    return case.frames


def with_line_end(case: WireCase, line_end: bytes) -> WireCase:
    """The same answer with other line ends."""
    return map_frames(case, lambda frame: frame.replace(b"\r\n", b"\n").replace(b"\n", line_end))


def with_noise(case: WireCase, *noise: bytes) -> WireCase:
    """The same answer with this noise before every frame; a byte order mark stays where it is."""
    frames = [b"".join(noise) + frame.removeprefix(BOM) for frame in case.frames]
    mark = BOM if case.frames[0].startswith(BOM) else b""
    return replace(case, frames=[mark + frames[0], *frames[1:]])


def map_frames(case: WireCase, change: Callable[[bytes], bytes]) -> WireCase:
    """The case with every frame changed."""
    return replace(case, frames=[change(frame) for frame in case.frames])


def replaced(case: WireCase, index: int, frame: bytes) -> list[bytes]:
    """The case's frames with another one at ``index``."""
    return [*case.frames[:index], frame, *case.frames[index + 1 :]]


def json_span(frame: bytes) -> tuple[int, int] | None:
    """Where the JSON object of a frame is; None if there is none, or it is on several lines."""
    start, end = frame.find(b"{"), frame.rfind(b"}") + 1
    if start < 0 or b"\n" in frame[start:end]:
        return None
    try:
        return (start, end) if isinstance(json.loads(frame[start:end]), dict) else None
    except (ValueError, RecursionError):
        return None


def json_of(frame: bytes) -> Any:
    """The JSON object of a frame; None if there is none."""
    span = json_span(frame)
    return None if span is None else json.loads(frame[slice(*span)])


def map_json(frame: bytes, change: Callable[[Any], Any]) -> bytes:
    """The frame with its JSON object changed and written as Python's ``json`` does: all ASCII, with spaces.

    A frame without a JSON object stays as it is.
    """
    span = json_span(frame)
    if span is None:
        return frame
    start, end = span
    return frame[:start] + json.dumps(change(json_of(frame))).encode() + frame[end:]


Path: TypeAlias = tuple[str | int, ...]


def paths(value: Any, above: Path = ()) -> Iterator[Path]:
    """The way to each value inside a JSON value, itself included."""
    yield above
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from paths(inner, (*above, key))


def strings(value: Any) -> Iterator[str]:
    """All strings inside a JSON value that are no keys."""
    for path in paths(value):
        if isinstance(text := reduce(getitem, path, value), str):
            yield text


def with_value(value: Any, path: Path, new: Any) -> Any:
    """The JSON value with another one at the end of the way."""
    if not path:
        return new
    key, *rest = path
    inner = with_value(value[key], tuple(rest), new)
    if isinstance(value, dict):
        return value | {key: inner}
    return [inner if position == key else old for position, old in enumerate(value)]
