"""Chunks of nothing but whole events, as models send them: taken apart at once, and to the same end as all others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.sse import EventTooLargeError, ServerSentEvent, SSEParser

LINES = st.lists(
    st.sampled_from([b"data: a", b"data: ", b"data:b", b"id: 7", b"event: x", b": c", b"", b"data"]), max_size=8
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(st.lists(st.tuples(LINES, ENDS), min_size=1, max_size=4), st.integers(1, 6))
def test_events_are_those_of_the_bytes_one_by_one(blocks: list[tuple[list[bytes], bytes]], parts: int) -> None:
    body = b"".join(line + end for lines, end in blocks for line in [*lines, b"data: z", b""])
    one_by_one, at_once = SSEParser(), SSEParser()
    expected = [event for byte in body for event in one_by_one.feed(bytes([byte]))]
    size = len(body) // parts + 1
    found = [event for start in range(0, len(body), size) for event in at_once.feed(body[start : start + size])]
    assert found == expected
    assert at_once.last_event_id == one_by_one.last_event_id


def test_a_carriage_return_ends_a_line_among_plain_events_too() -> None:
    parser = SSEParser()
    parser.feed(b": known to have no mark of byte order\n")
    assert parser.feed(b"data: a\rdata: b\n\n") == [ServerSentEvent(b"a\nb")]


def test_plain_events_are_bounded_one_by_one() -> None:
    parser = SSEParser(max_event_bytes=20)
    parser.feed(b": x\n")
    assert len(parser.feed(b"data: 12345678\n\n" * 3)) == 3
    with pytest.raises(EventTooLargeError):
        parser.feed(b"data: " + b"1" * 15 + b"\n\n")
