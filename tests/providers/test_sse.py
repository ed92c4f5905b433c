"""The event stream parser against the WHATWG rules, an oracle, its size bound and its linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.sse import EventTooLargeError, ServerSentEvent, SSEParser


def parse(*chunks: bytes) -> list[ServerSentEvent]:
    """All events of one body that arrives in ``chunks``."""
    parser = SSEParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def data_of(*chunks: bytes) -> list[bytes]:
    """The data of all events of one body."""
    return [event.data for event in parse(*chunks)]


def test_event_defaults() -> None:
    assert parse(b"data: hello\n\n") == [ServerSentEvent(b"hello", "message", "")]


def test_all_fields_in_any_order() -> None:
    parser = SSEParser()
    events = parser.feed(b"retry: 1500\nid: 7\nevent: ping\ndata: x\n\n")
    assert events == [ServerSentEvent(b"x", "ping", "7")]
    assert (parser.last_event_id, parser.retry) == ("7", 1500)


BODIES: dict[str, tuple[bytes, list[bytes]]] = {
    "LF": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "CR": (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "mixed line ends": (b"data: a\r\n\ndata: b\n\r\ndata: c\r\n\rdata: d\n\r", [b"a", b"b", b"c", b"d"]),
    "lines joined": (b"data: a\ndata: b\n\n", [b"a\nb"]),
    "lines joined over CR": (b"data: a\rdata: b\r\r", [b"a\nb"]),
    "lines joined over CRLF": (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"]),
    "blank lines between": (b"\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [b"a", b"b"]),
    "one space off": (b"data:  a \n\n", [b" a "]),
    "no space": (b"data:a\n\n", [b"a"]),
    "a tab stays": (b"data:\ta\n\n", [b"\ta"]),
    "colons stay": (b"data: a: b:c\n\n", [b"a: b:c"]),
    "no colon": (b"data\n\n", [b""]),
    "two without colon": (b"data\ndata\n\n", [b"\n"]),
    "empty data": (b"data:\n\n", [b""]),
    "only a space": (b"data: \n\n", [b""]),
    "no data": (b"event: x\n\ndata: a\n\n", [b"a"]),
    "comment": (b": hi\ndata: a\n:data: no\n:\n\n", [b"a"]),
    "comment alone": (b": ping\n\n: ping\n\n", []),
    "unknown fields": (b"dat: no\ndataa: no\nDATA: no\n data: no\ndata : no\nfoo\ndata: a\n\n", [b"a"]),
    "unterminated block": (b"data: a\n\ndata: b\n", [b"a"]),
    "unterminated line": (b"data: a\n\ndata: b", [b"a"]),
    "BOM": (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    "BOM strips once": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [b"b"]),
    "BOM at the start only": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
    "half a BOM": (b"\xef\xbbdata: a\n\ndata: b\n\n", [b"b"]),
    "NUL in data": (b"data: a\0b\n\n", [b"a\0b"]),
    "invalid UTF-8 stays": (b"data: \xff\xc3\n\n", [b"\xff\xc3"]),
    "no line ends": (
        "data: \x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\n\n".encode(),
        ["\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029".encode()],
    ),
    "raw 0x85": (b"data: a\x85b\n\n", [b"a\x85b"]),
    "empty": (b"", []),
    "BOM alone": (b"\xef\xbb\xbf", []),
    # The four examples of the standard, section 9.2.6.
    "spec: stocks": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [b"YHOO\n+2\n10"]),
    "spec: blocks": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event",
        [b"first event", b"second event"],
    ),
    "spec: empty": (b"data\n\ndata\ndata\n\ndata:", [b"", b"\n"]),
    "spec: space": (b"data:test\n\ndata: test\n\n", [b"test", b"test"]),
}


@pytest.mark.parametrize("case", BODIES)
def test_body_in_one_chunk(case: str) -> None:
    body, expected = BODIES[case]
    assert data_of(body) == expected


@pytest.mark.parametrize("case", BODIES)
def test_body_byte_by_byte(case: str) -> None:
    body, expected = BODIES[case]
    assert data_of(*(body[i : i + 1] for i in range(len(body)))) == expected


@pytest.mark.parametrize("case", BODIES)
def test_body_cut_in_two_anywhere(case: str) -> None:
    body, expected = BODIES[case]
    for cut in range(len(body) + 1):
        assert data_of(body[:cut], b"", body[cut:]) == expected


def test_event_is_handed_out_at_once_after_a_cr() -> None:
    """Waiting for a LF that may follow would hold the event back until the next one."""
    parser = SSEParser()
    assert parser.feed(b"data: a\r\n\r") == [ServerSentEvent(b"a")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: b\r\n\r") == [ServerSentEvent(b"b")]
    assert parser.feed(b"data: c\r\n\r") == [ServerSentEvent(b"c")]


def test_type_resets_after_each_block() -> None:
    assert [event.event for event in parse(b"event: a\ndata\n\ndata\n\nevent: b\n\ndata\n\nevent\ndata\n\n")] == [
        "a",
        "message",
        "message",
        "message",
    ]


def test_last_of_repeated_fields_counts() -> None:
    assert parse(b"event: a\nid: 1\nevent: b\nid: 2\ndata\n\n") == [ServerSentEvent(b"", "b", "2")]


def test_id_sticks_until_changed() -> None:
    assert [event.id for event in parse(b"data\n\nid: 1\ndata\n\ndata\n\nid: 2\ndata\n\n")] == ["", "1", "1", "2"]


def test_empty_id_resets() -> None:
    for reset in (b"id", b"id:", b"id: "):
        parser = SSEParser()
        parser.feed(b"id: 1\ndata\n\n")
        assert [event.id for event in parser.feed(reset + b"\ndata\n\n")] == [""]
        assert parser.last_event_id == ""


def test_id_with_nul_is_ignored() -> None:
    assert [event.id for event in parse(b"id: 1\ndata\n\nid: 2\0\ndata\n\n")] == ["1", "1"]


def test_id_is_committed_without_data() -> None:
    parser = SSEParser()
    assert parser.feed(b"id: 7\n") == []
    assert parser.last_event_id == ""
    assert parser.feed(b"\n") == []
    assert parser.last_event_id == "7"
    assert parser.feed(b"data\n\n") == [ServerSentEvent(b"", id="7")]


def test_id_of_an_unterminated_block_is_not_committed() -> None:
    parser = SSEParser()
    parser.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n")
    assert parser.last_event_id == "1"


def test_names_are_decoded_as_the_standard_does() -> None:
    assert parse("id: é\nevent: 字\ndata\n\n".encode()) == [ServerSentEvent(b"", "字", "é")]
    assert parse(b"id: \xff\nevent: \xff\ndata\n\n") == [ServerSentEvent(b"", "\ufffd", "\ufffd")]


@pytest.mark.parametrize(
    ("value", "retry"),
    [
        (b"0", 0),
        (b"1500", 1500),
        (b"007", 7),
        (b"", None),
        (b"1_0", None),
        (b" 5", None),
        (b"5 ", None),
        (b"+5", None),
        (b"-5", None),
        (b"1.5", None),
        (b"1e3", None),
        (b"0x10", None),
        ("٣".encode(), None),
        ("²".encode(), None),
        (b"9" * 5000, None),
    ],
)
def test_retry_takes_ascii_digits_only(value: bytes, retry: int | None) -> None:
    parser = SSEParser()
    parser.feed(b"retry: " + value + b"\n")
    assert parser.retry == retry


def test_bad_retry_keeps_the_last_good_one() -> None:
    parser = SSEParser()
    parser.feed(b"retry: 10\nretry: x\n\n")
    assert parser.retry == 10


def reference(body: bytes) -> list[ServerSentEvent]:
    """The standard's algorithm, step by step over one whole body, slow and plain."""
    body = body[3:] if body[:3] == b"\xef\xbb\xbf" else body
    lines, line, position = [], b"", 0
    while position < len(body):
        byte = body[position : position + 1]
        if byte in (b"\r", b"\n"):
            lines.append(line)
            line = b""
            position += 2 if body[position : position + 2] == b"\r\n" else 1
        else:
            line += byte
            position += 1
    events, data, event_type, last_id = [], b"", "", ""
    for line in lines:
        if line == b"":
            if data != b"":
                events.append(ServerSentEvent(data[:-1], event_type or "message", last_id))
            data, event_type = b"", ""
            continue
        if line[:1] == b":":
            continue
        field, value = (line[: line.index(b":")], line[line.index(b":") + 1 :]) if b":" in line else (line, b"")
        value = value[1:] if value[:1] == b" " else value
        if field == b"data":
            data += value + b"\n"
        elif field == b"event":
            event_type = value.decode("utf-8", "replace")
        elif field == b"id" and b"\0" not in value:
            last_id = value.decode("utf-8", "replace")
    return events


LINE_ENDS = [b"\n", b"\r", b"\r\n", b"\n\n"]
FIELDS = [b"data", b"data: ", b"data:", b"id: ", b"id", b"event: ", b"retry: 5", b":", b" "]
VALUES = [b"\xef\xbb\xbf", b"\xef\xbb", b"\0", "é".encode(), "\u2028".encode(), b"\x85", b"\x0b", b"x", b"{}"]
FRAGMENTS = st.sampled_from([*LINE_ENDS, *FIELDS, *VALUES])
BODY = st.one_of(st.lists(FRAGMENTS, max_size=40).map(b"".join), st.binary(max_size=60))


@given(body=BODY, data=st.data())
def test_any_split_gives_what_the_reference_gives(body: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    chunks = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert parse(*chunks) == reference(body)


@given(body=BODY, limit=st.integers(1, 20), data=st.data())
def test_any_split_meets_the_bound_at_the_same_event(body: bytes, limit: int, data: st.DataObject) -> None:
    def outcome(chunks: list[bytes]) -> tuple[list[ServerSentEvent], bool]:
        parser = SSEParser(limit)
        events: list[ServerSentEvent] = []
        try:
            for chunk in chunks:
                events += parser.feed(chunk)
        except EventTooLargeError as error:
            return [*events, *error.events], True
        return events, False

    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    assert outcome([body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]) == outcome([body])


def test_bound_is_exact() -> None:
    assert SSEParser(8).feed(b"data: xy\n\n") == [ServerSentEvent(b"xy")]
    with pytest.raises(EventTooLargeError, match="larger than 8 bytes"):
        SSEParser(8).feed(b"data: xyz\n")


def test_bound_holds_for_joined_lines() -> None:
    parser = SSEParser(11)
    assert parser.feed(b"data: abcde\ndata: fghij\n\n") == [ServerSentEvent(b"abcde\nfghij")]
    with pytest.raises(EventTooLargeError):
        parser.feed(b"data: abcde\ndata: fghij\ndata\n\n")


def test_bound_is_per_event() -> None:
    assert len(SSEParser(16).feed(b": comment\ndata: abcde\n\n" * 1000)) == 1000


def test_comments_do_not_add_up() -> None:
    parser = SSEParser(16)
    for _ in range(1000):
        assert parser.feed(b": keep-alive\n") == []
    assert parser.feed(b"data: x\n\n") == [ServerSentEvent(b"x")]


def bytes_until_refused(parser: SSEParser, chunk: bytes, at_most: int) -> int:
    """Feed ``chunk`` again and again; how many bytes the parser took before it raised."""
    for fed in range(0, at_most, len(chunk)):
        try:
            parser.feed(chunk)
        except EventTooLargeError:
            return fed
    return at_most


@pytest.mark.parametrize("start", [b"data: ", b": ", b"id: ", b"", b"\xef\xbb\xbf"])
def test_endless_line_is_refused(start: bytes) -> None:
    parser = SSEParser(1 << 16)
    parser.feed(start)
    assert bytes_until_refused(parser, b"x" * 1024, 1 << 20) <= 1 << 16


def test_endless_event_of_empty_lines_is_refused() -> None:
    assert bytes_until_refused(SSEParser(1 << 10), b"data\n", 1 << 20) <= 5 * 1025


def test_events_before_the_too_large_one_come_with_the_error() -> None:
    parser = SSEParser(16)
    with pytest.raises(EventTooLargeError) as caught:
        parser.feed(b"data: a\n\ndata: b\n\ndata: " + b"x" * 99)
    assert [event.data for event in caught.value.events] == [b"a", b"b"]
    assert caught.value.limit == 16


def test_spent_parser_goes_on_raising() -> None:
    parser = SSEParser(4)
    for body in (b"data: x", b"\n\n", b""):
        with pytest.raises(EventTooLargeError) as caught:
            parser.feed(body)
        assert caught.value.events == ()


def test_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SSEParser(0)


def seconds_to_parse(body: bytes, chunk_bytes: int) -> float:
    """CPU seconds for one body in chunks of ``chunk_bytes``, the best of three."""
    best = float("inf")
    for _ in range(3):
        parser = SSEParser(len(body))
        started = time.process_time()
        events = [event for i in range(0, len(body), chunk_bytes) for event in parser.feed(body[i : i + chunk_bytes])]
        best = min(best, time.process_time() - started)
        assert events
    return best


@pytest.mark.parametrize(
    ("unit", "chunk_bytes", "small"),
    [
        (b"x", 1, 40_000),
        (b"x", 1024, 2_500_000),
        (b"x\ndata: ", 1, 5_000),
        (b"x\ndata: ", 65_536, 40_000),
        (b"x\n\ndata: ", 65_536, 40_000),
        (b"x\r\n\r\ndata: ", 65_536, 40_000),
    ],
)
def test_time_is_linear(unit: bytes, chunk_bytes: int, small: int) -> None:
    """Eight times the input takes about eight times as long; a quadratic parser would take 64 times."""
    body = b"data: " + unit * small + b"\n\n"
    large = b"data: " + unit * (8 * small) + b"\n\n"
    assert seconds_to_parse(large, chunk_bytes) < 24 * max(seconds_to_parse(body, chunk_bytes), 0.001)
