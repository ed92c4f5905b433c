"""The recorded traffic in ``data/``: GPT-4o's reads as times of events, Mooncake's requests as arrivals and lengths."""

from __future__ import annotations

import gzip
import itertools
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec

DATA = Path(__file__).parent / "data"


class RecordedStream(msgspec.Struct, frozen=True):
    """One answer as its TLS records came in."""

    id: str
    ttfb_ms: float
    gaps_ms: list[float]
    record_bytes: list[int]
    content_chunks: int


class _Records(msgspec.Struct, frozen=True):
    streams: list[RecordedStream]


class Arrival(NamedTuple):
    """One request of the Mooncake trace."""

    at_ms: int
    input_tokens: int
    output_tokens: int


@cache
def gpt4o_streams() -> list[RecordedStream]:
    """All of them, in the order of the file."""
    return msgspec.json.decode(
        gzip.decompress((DATA / "gpt4o_tls_records.json.gz").read_bytes()), type=_Records
    ).streams


def content_offsets_ns(stream: RecordedStream) -> list[int]:
    """When each content chunk came, from the request: as many with a record as its share of the bytes says.

    How chunks were split over records was not recorded. Those of one record have the same time, and are one write.
    """
    at_ms = list(itertools.accumulate(stream.gaps_ms, initial=stream.ttfb_ms))[1:]
    cumulated = list(itertools.accumulate(stream.record_bytes[1:]))
    offsets: list[int] = []
    for at, so_far in zip(at_ms, cumulated, strict=True):
        completed = round(stream.content_chunks * so_far / cumulated[-1])
        offsets += [round(at * 1_000_000)] * (completed - len(offsets))
    return offsets


@cache
def mooncake_arrivals() -> list[Arrival]:
    """The first 2,000 requests, 669 s of them."""
    text = gzip.decompress((DATA / "mooncake_conversation.csv.gz").read_bytes()).decode()
    return [Arrival(*map(int, line.split(","))) for line in text.splitlines()[1:]]
