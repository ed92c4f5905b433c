from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest

from benchmarks.bench.scripts import content_event
from benchmarks.bench.stamps import MARK, TO_FILL, WIDTH, Finder, Found, filling, prepared, stamp

TAG = 12
COUNT = 4
AT = 1_234_567_890_123
TEXTS = [stamp(number, TAG, AT + number, last=number == COUNT - 1) for number in range(COUNT)]
ALL = [(b"%05d" % n, b"000012", b"%018d" % (AT + n), b"!" if n == COUNT - 1 else b";") for n in range(COUNT)]


def in_chunks(*events: str, size: int | None = None) -> bytes:
    """In HTTP's chunked coding: each event in a chunk, or all in chunks of that size."""
    data = [event.encode() for event in events]
    if size is not None:
        joined = b"".join(data)
        data = [joined[at : at + size] for at in range(0, len(joined), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in data) + b"0\r\n\r\n"


def native(text: str) -> str:
    return f'id: aBc_-9.7\ndata: {{"chunk_type":"content","content":"{text}","step_id":"step-1"}}\n\n'


def openai(text: str) -> str:
    return f'data: {{"id":"x","choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}]}}\n\n'


def plain(text: str) -> str:
    return f"event: token\r\ndata: {text}\r\n\r\n"


FRAMES: list[Callable[[str], str]] = [native, openai, plain]


def found_in(pieces: list[bytes]) -> list[Found]:
    finder = Finder()
    return [found for piece in pieces for found in finder.feed(piece)]


def test_a_stamp_has_its_width() -> None:
    filled = prepared(7, last=True).encode().replace(TO_FILL, filling(TAG, AT)).decode()
    assert filled == stamp(7, TAG, AT, last=True)
    assert len(filled) == WIDTH
    assert msgspec.json.encode(filled) == f'"{filled}"'.encode()


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", [None, 7, 50])
def test_found_wherever_reads_and_chunks_are_cut(frame: Callable[[str], str], size: int | None) -> None:
    data = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + in_chunks(*map(frame, TEXTS), size=size)
    assert found_in([data]) == ALL
    for cut in range(1, len(data)):
        assert found_in([data[:cut], data[cut:]]) == ALL, cut


@pytest.mark.parametrize("frame", FRAMES)
def test_found_byte_by_byte(frame: Callable[[str], str]) -> None:
    data = in_chunks(*map(frame, TEXTS), size=20)
    assert found_in([data[at : at + 1] for at in range(len(data))]) == ALL


def test_several_deltas_in_one_frame() -> None:
    assert found_in([native("".join(TEXTS)).encode()]) == ALL


def test_a_mark_that_begins_no_stamp_holds_nothing_up() -> None:
    finder = Finder()
    found = [finder.feed(piece.encode()) for piece in itertools.chain(["~ is no stamp"], TEXTS)]
    assert [one for some in found for one in some] == ALL


def test_only_stamps_have_the_mark() -> None:
    assert content_event(3).count(MARK) == 1
