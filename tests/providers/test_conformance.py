"""Every wire format, every case, on bytes alone: however they are cut, written and disturbed, they mean the same.

The cases are data in ``wire_cases/``. Every way to cut a body in two is tried up to ``EVERY_CUT_BYTES``; what is larger
is cut around its line ends, its escapes and its characters of several bytes. ``test_conformance_network.py`` runs the
same cases over HTTP.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import PROVIDER_ERROR_CODES
from engine.pieces import (
    ContinuationPiece,
    FinishPiece,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
    UsagePiece,
)
from providers.wire import MAX_LINE_BYTES

from .conformance import (
    BY_MODULE,
    CASES,
    Outcome,
    Reading,
    body_of,
    by_case,
    by_module,
    by_wire,
    decode,
    is_event_stream,
    json_of,
    json_span,
    live_frames,
    map_frames,
    map_json,
    meant,
    paths,
    replaced,
    strings,
    with_line_end,
    with_noise,
    with_value,
)
from .wire_cases import WireCase

EVERY_CUT_BYTES = 2048
READ_BYTES = 65_536

EVENT_NOISE = (
    b": keep-alive\n\n",
    b":\n\n",
    b"\n\n\n",
    b"event: lumos.unknown\n\n",
    b"id: 7\nretry: 1500\n\n",
    b"unknown: field\nno colon\n\n",
)
LINE_NOISE = (b"\n", b"\n\n", b" \t\n")


# The cases themselves


def test_every_module_has_cases_with_names_of_their_own() -> None:
    assert all(BY_MODULE.values())
    names = [case.name for case in CASES]
    assert sorted(names) == sorted(set(names))


@by_case
def test_a_case_keeps_the_contract_of_pieces(case: WireCase) -> None:
    """What ``engine.pieces`` promises, and the run relies on."""
    pieces = case.pieces
    kinds = [type(piece) for piece in pieces]
    assert set(kinds) <= {TextPiece, ReasoningPiece, ToolCallPiece, ContinuationPiece, UsagePiece, FinishPiece}
    assert all(piece.text for piece in pieces if isinstance(piece, TextPiece | ReasoningPiece))
    assert kinds.count(FinishPiece) == 1 if case.error is None else kinds.count(FinishPiece) <= 1
    if FinishPiece in kinds:
        assert set(kinds[kinds.index(FinishPiece) + 1 :]) <= {UsagePiece}, "content after the finish"
    assert kinds.count(ContinuationPiece) <= 1
    for piece in pieces:
        if isinstance(piece, UsagePiece):
            assert min(piece.input_tokens, piece.output_tokens) >= 0
    assert_calls_are_told_apart(case)


def assert_calls_are_told_apart(case: WireCase) -> None:
    """Each call has one name, at most one id and, if all went well, arguments that are a JSON object or nothing."""
    calls: dict[int, list[ToolCallPiece]] = {}
    for piece in case.pieces:
        if isinstance(piece, ToolCallPiece):
            calls.setdefault(piece.index, []).append(piece)
    for fragments in calls.values():
        assert sum(fragment.name is not None for fragment in fragments) == 1
        assert sum(fragment.call_id is not None for fragment in fragments) <= 1
        arguments = "".join(fragment.arguments_fragment for fragment in fragments)
        if case.error is None and arguments:
            assert isinstance(json.loads(arguments), dict)


# The same bytes, cut in other places


@by_case
def test_an_answer_means_its_pieces_and_each_frame_says_them_at_once(case: WireCase) -> None:
    """Whole and frame by frame; and text comes with the very frame that holds it."""
    assert decode(case, [body_of(case)]) == meant(case)
    assert decode(case, case.frames) == meant(case)
    before = 0
    for count, frame in enumerate(live_frames(case), 1):
        pieces = decode(case, case.frames[:count]).pieces
        for piece in pieces[before:]:
            if isinstance(piece, TextPiece | ReasoningPiece) and json_of(frame) is not None:
                held = [text for text in strings(json_of(frame)) if text]
                assert any(piece.text in text or text in piece.text for text in held), f"{piece} came late"
        before = len(pieces)


def cut_in_two(body: bytes) -> Iterator[int]:
    """Where to cut: everywhere, or where it may matter if the body is large."""
    for position in range(1, len(body)):
        if len(body) <= EVERY_CUT_BYTES or not set(body[position - 2 : position + 2]).isdisjoint(AROUND):
            yield position


AROUND = frozenset(b"\r\n\\") | frozenset(range(0x80, 0x100))
"""Line ends, escapes, and the bytes of characters that take several."""


@by_case
def test_a_cut_at_any_byte_changes_nothing(case: WireCase) -> None:
    body, expected = body_of(case), meant(case)
    for position in cut_in_two(body):
        assert decode(case, [body[:position], body[position:]]) == expected, body[:position]


def line_ends_of(case: WireCase) -> Sequence[bytes]:
    """How the lines of this format may end."""
    return (b"\n", b"\r\n", b"\r") if is_event_stream(case) else (b"\n", b"\r\n")


@by_case
def test_line_ends_change_nothing(case: WireCase) -> None:
    for line_end in line_ends_of(case):
        other = with_line_end(case, line_end)
        assert decode(other, [body_of(other)]) == meant(case), line_end
        assert decode(other, other.frames) == meant(case), line_end


@by_case
def test_byte_by_byte_pieces_come_with_their_frame_and_no_byte_ends_it_early(case: WireCase) -> None:
    for line_end in line_ends_of(case):
        other, reading = with_line_end(case, line_end), Reading(case)
        for count, frame in enumerate(other.frames, 1):
            for byte in frame:
                reading.feed(bytes([byte]))
                assert not reading.is_whole or has_finish(reading.pieces)
            assert reading.pieces == decode(other, other.frames[:count]).pieces, "held back, or said before its time"
        assert reading.outcome() == meant(case), line_end


def has_finish(pieces: Sequence[Piece]) -> bool:
    """Whether they tell why the model stopped."""
    return any(isinstance(piece, FinishPiece) for piece in pieces)


@settings(max_examples=6, deadline=None)
@given(chance=st.randoms(use_true_random=True))
@by_case
def test_random_reads_with_random_noise_change_nothing(case: WireCase, chance: random.Random) -> None:
    noise = chance.choices([*case.noise, *format_noise(case)], k=chance.randint(0, 3))
    other = with_line_end(with_noise(case, *noise), chance.choice(line_ends_of(case)))
    assert decode(case, random_reads(body_of(other), chance)) == meant(case)


def random_reads(body: bytes, chance: random.Random) -> list[bytes]:
    """The body in portions as a network may bring them."""
    count = min(chance.choice([1, 3, 10, 100]), len(body) - 1)
    cuts = sorted(chance.sample(range(1, len(body)), count))
    return [body[start:end] for start, end in itertools.pairwise([0, *cuts, len(body)])]


@by_wire
def test_answers_at_the_same_time_do_not_mix(case: WireCase) -> None:
    """A wire format has no state of its own: two answers, decoded in turns, are both what they mean."""
    answers = [Reading(case), Reading(case)]
    for frame, answer in itertools.product(case.frames, answers):
        answer.feed(frame)
    assert [answer.outcome() for answer in answers] == [meant(case)] * 2


# The same answer, written otherwise


def format_noise(case: WireCase) -> Sequence[bytes]:
    """What means nothing in every stream of this format."""
    return EVENT_NOISE if is_event_stream(case) else LINE_NOISE


@by_case
def test_noise_changes_nothing(case: WireCase) -> None:
    """One kind of noise at a time, all kinds at once, and all kinds in small reads."""
    kinds = (*case.noise, *format_noise(case))
    assert decode(case, kinds) == decode(case, []) == Outcome([], "upstream.truncated"), "noise alone"
    for noise in kinds:
        assert decode(case, with_noise(case, noise).frames) == meant(case), noise
    noisy = body_of(with_noise(case, *kinds))
    assert decode(case, [noisy]) == meant(case)
    assert decode(case, (noisy[at : at + 11] for at in range(0, len(noisy), 11))) == meant(case)


@by_case
def test_other_json_that_says_the_same_changes_nothing(case: WireCase) -> None:
    r"""Written by Python: ``\uXXXX`` for all that is not ASCII, and spaces; with unknown fields first, and last."""
    unknown = {"lumos_unknown": {"type": "error", "deep": [1, None, {"x": [True, -2.5e300]}]}, "数": "流"}
    ways: Sequence[Callable[[Any], Any]] = (
        lambda value: value,
        lambda value: unknown | value,
        lambda value: value | unknown,
    )
    for way in ways:
        other = map_frames(case, partial(map_json, change=way))
        assert arguments_parsed(decode(other, other.frames)) == arguments_parsed(meant(case))


def arguments_parsed(outcome: Outcome) -> tuple[object, ...]:
    """The outcome, where arguments that came as a JSON object count as such: an adapter may pass on their very text."""
    pieces: list[object] = []
    for piece in outcome.pieces:
        if isinstance(piece, ToolCallPiece):
            with suppress(ValueError):
                pieces.append((piece.index, piece.call_id, piece.name, json.loads(piece.arguments_fragment)))
                continue
        pieces.append(piece)
    return (pieces, outcome.error)


@by_case
def test_bytes_after_the_end_mark_are_ignored(case: WireCase) -> None:
    body, reading = b"".join(live_frames(case)), Reading(case)
    reading.feed(body)
    if not reading.ended_by_mark:
        return  # it ends in an error, or with the body
    for tail in (body, b"data: {nope\n\n{nope\n", b"\xff\xfe\x00", b"x" * READ_BYTES):
        assert decode(case, [body + tail]) == meant(case)


# Another answer: cut off, or broken


@by_case
def test_no_answer_that_is_cut_off_counts_as_whole(case: WireCase) -> None:
    """After each frame but the last: truncated, unless the model's reason to stop was there already."""
    live = live_frames(case)
    for count in range(len(live)):
        outcome = decode(case, live[:count])
        if outcome.error is None:
            missing = {type(piece) for piece in case.pieces[len(outcome.pieces) :]}
            assert has_finish(outcome.pieces), f"an end after {count} frames would pass for a whole answer"
            assert missing <= {UsagePiece}, f"an end after {count} frames would lose content unseen"
        else:
            assert outcome.error == "upstream.truncated"
        assert outcome.pieces == list(case.pieces)[: len(outcome.pieces)]


@by_case
def test_broken_json_ends_the_answer_there(case: WireCase) -> None:
    """What came before is kept. A frame that nothing depends on may be broken unseen."""
    for index, frame in enumerate(live_frames(case)):
        span = json_span(frame)
        if span is None:
            continue
        start, end = span
        before, after = decode(case, case.frames[:index]), decode(case, case.frames[: index + 1])
        expected = [Outcome(before.pieces, "upstream.protocol")]
        if before == after:
            expected.append(meant(case))
        broken = {
            "without its last brace": frame[: end - 1] + frame[end:],
            "half of it": frame[: (start + end) // 2] + frame[end:],
            "a comma too many": frame[: end - 1] + b",}" + frame[end:],
            "no JSON": frame[:start] + b"upstream error" + frame[end:],
            "a list": frame[:start] + b"[" + frame[start:end] + b"]" + frame[end:],
            "nested without end": frame[:start] + b'{"x":' * 3000 + frame[end:],
        }
        for how, bad in broken.items():
            outcome = decode(case, replaced(case, index, bad))
            assert outcome in expected, f"frame {index}, {how}"
            assert decode(case, [b"".join(replaced(case, index, bad))]) == outcome, f"frame {index}, {how}, whole"


@by_case
def test_invalid_utf8_ends_the_answer_there(case: WireCase) -> None:
    """In every text that becomes part of a piece: a byte of no character, and a character without its last byte."""
    texts = {text for piece in case.pieces for text in strings(msgspec.to_builtins(piece)) if text}
    for index, frame in enumerate(live_frames(case)):
        before = decode(case, case.frames[:index])
        expected = [Outcome(before.pieces, "upstream.protocol")]
        if before == decode(case, case.frames[: index + 1]):
            expected.append(meant(case))
        for text in texts & set(strings(json_of(frame))):
            for bad in INVALID_UTF8:
                broken = value_of(text).sub(re.escape(bad) + rb"\g<0>", frame)
                if broken != frame:  # else it is written with escapes
                    assert decode(case, replaced(case, index, broken)) in expected, f"frame {index}, {text!r}"


INVALID_UTF8 = (b"\xff", "流".encode()[:-1], b"\xed\xa0\x80", b"\xc0\xaf")
"""A byte of no character, a character without its last byte, a surrogate, a slash on two bytes."""


def value_of(text: str) -> re.Pattern[bytes]:
    """Finds the text where it is a string in JSON and no key."""
    return re.compile(rb'(?<=")' + re.escape(msgspec.json.encode(text)[1:-1]) + rb'(?="(?!\s*:))')


@by_wire
def test_a_huge_frame_ends_the_answer_there(case: WireCase) -> None:
    """In reads of 64 KiB as they come, and all at once: what came before is kept."""
    for index, frame in enumerate(live_frames(case)):
        padded_at = frame.find(b"{") + 1 or len(frame.rstrip())
        huge = frame[:padded_at] + b" " * (MAX_LINE_BYTES + 1) + frame[padded_at:]
        body = b"".join(replaced(case, index, huge))
        expected = Outcome(decode(case, case.frames[:index]).pieces, "upstream.protocol")
        assert decode(case, [body[at : at + READ_BYTES] for at in range(0, len(body), READ_BYTES)]) == expected
        assert decode(case, [body]) == expected


@by_wire
def test_an_endless_frame_ends_the_answer_there(case: WireCase) -> None:
    """A line that never ends: refused while it comes, not kept."""
    start = b"data: " if is_event_stream(case) else b""
    endless = [start, *[b" " * READ_BYTES] * (MAX_LINE_BYTES // READ_BYTES), b" "]
    for index in range(len(live_frames(case))):
        expected = Outcome(decode(case, case.frames[:index]).pieces, "upstream.protocol")
        assert decode(case, [*case.frames[:index], *endless]) == expected


WRONG_VALUES: Sequence[Any] = (None, True, -1, 2**70, 1.5, "", "x", [], [None], [[]], {}, {"x": None}, [{}])


@by_module
def test_values_of_a_wrong_kind_are_errors_of_the_model_alone(cases: Sequence[WireCase]) -> None:
    """Each value in each kind of frame replaced by others: no exception of ours, no end without a reason.

    Fields that the frame's kind has had before with the same surroundings are not tried again.
    """
    tried = set()
    for case in cases:
        for index, frame in enumerate(live_frames(case)):
            original = json_of(frame)
            if original is None:
                continue
            for path in paths(original):
                field = (original.get("type"), tuple("" if isinstance(key, int) else key for key in path))
                if field in tried:
                    continue
                tried.add(field)
                for wrong in WRONG_VALUES:
                    bad = map_json(frame, partial(with_value, path=path, new=wrong))
                    assert_survives(case, replaced(case, index, bad))


DAMAGES = (b"", b"\0", b"\n", b"\r\n\r\n", b'"', b"}", b"[", b"\xff")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
@by_module
def test_damaged_bytes_are_errors_of_the_model_alone(cases: Sequence[WireCase], data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(cases), label="case")
    chance = data.draw(st.randoms(use_true_random=True))
    body = bytearray(body_of(case))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(body) + 1)
        body[at : at + chance.randint(0, 3)] = chance.choice(DAMAGES)
    assert_survives(case, [bytes(body)])


def assert_survives(case: WireCase, reads: Sequence[bytes]) -> None:
    """Whatever the reads are, they come to a known code, or to pieces with a reason to stop."""
    try:
        outcome = decode(case, reads)
    except Exception as bug:
        bug.add_note(f"{case.name}: {reads!r}")
        raise
    if outcome.error is None:
        assert has_finish(outcome.pieces)
    else:
        assert outcome.error in PROVIDER_ERROR_CODES
