"""Chunked bodies taken apart: whatever the reads are, and what is left to h11."""

from __future__ import annotations

from collections.abc import Sequence

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.chunked import ChunkedReader


def encoded(parts: Sequence[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def fed(reads: Sequence[bytes]) -> tuple[bytes, bytes | None]:
    """The data of the chunks, and what is left for h11."""
    reader = ChunkedReader()
    parts: list[bytes] = []
    unread = list(reads)
    while unread and reader.rest is None:
        parts.append(reader.feed(unread.pop(0)))
    return b"".join(parts), None if reader.rest is None else b"".join([reader.rest, *unread])


def feed_all(reader: ChunkedReader, reads: Sequence[bytes], parts: list[bytes]) -> None:
    parts.extend(map(reader.feed, reads))


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The data in reads that end at these places; none is empty."""
    ends = [*sorted({place % (len(data) + 1) for place in places} - {0, len(data)}), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


PARTS = st.lists(st.binary(min_size=1, max_size=40) | st.just(b"\r\n0\r\n\r\n"), min_size=1, max_size=8)
PLACES = st.lists(st.integers(0, 400), max_size=12)


@given(PARTS, PLACES)
def test_chunks_are_the_same_however_they_are_cut(parts: list[bytes], places: list[int]) -> None:
    assert fed(cut(encoded(parts), places)) == (b"".join(parts), None)


@given(
    PARTS,
    PLACES,
    st.sampled_from(
        [b"0\r\n\r\n", b"0\r\nx-sum: 1\r\n\r\n", b"3;a=b\r\nabc\r\n", b"zz\r\n", b"\r\n", b"5\nabcde", b"f" * 20]
    ),
)
def test_what_is_not_plain_is_left_to_h11_from_the_chunks_beginning(
    parts: list[bytes], places: list[int], odd: bytes
) -> None:
    assert fed(cut(encoded(parts) + odd, places)) == (b"".join(parts), odd)


@pytest.mark.parametrize("end", [b"x", b"\rx", b"\n", b"xx\r\n"])
@pytest.mark.parametrize("cuts", [[], [3], [6], [7], [3, 6, 7]], ids=str)
def test_a_chunk_without_its_end_is_refused_after_what_it_said(end: bytes, cuts: list[int]) -> None:
    reader = ChunkedReader()
    parts: list[bytes] = []
    reads = cut(b"3\r\nabc" + end, cuts)
    feed_all(reader, reads, parts)
    assert isinstance(reader.fault, h11.RemoteProtocolError)
    assert b"".join(parts) == b"abc"


def test_a_begun_size_is_waited_for() -> None:
    reader = ChunkedReader()
    parts: list[bytes] = []
    feed_all(reader, (b"1", b"0\r", b"\n", b"x" * 16, b"\r", b"\n"), parts)
    assert (b"".join(parts), reader.rest, reader.fault) == (b"x" * 16, None, None)
