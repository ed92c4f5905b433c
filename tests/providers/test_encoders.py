"""Encoders against the decoders that they are the inverse of, over made-up answers, the wire cases and recordings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import (
    ContinuationPiece,
    FinishPiece,
    FinishReason,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
    UsagePiece,
)
from providers.dashscope import DashScopeWire
from providers.encoders import MOCKED_VENDORS, AnswerFacts, answer_facts, encoded_reads, raw_reads, whole_answer
from providers.encoders.base import REPORTED_CODES, Encoder, event, with_whole_calls
from providers.encoders.whole import anthropic_message, chat_completion
from providers.recording import RecordedFailure, RecordedRead, Recording, RecordingHeader, load, names
from providers.vendors import VENDORS
from providers.wire import Wire
from tests.harness.recordings import steady_recording

from .conformance import CASES, Outcome, decode
from .wire_cases import WireCase

HEADER = steady_recording(last=3.0).header


@dataclass(frozen=True)
class Ability:
    """What a format can say, as its encoder's docstring tells.

    Attributes:
        usage_first: the answer begins with a usage.
        usage_after: a usage may follow the finish reason, or all come before it.
        opening_alone: a call's first piece has no arguments.
        named: a call keeps its id.
    """

    provider: str
    wire: Wire
    reasons: frozenset[FinishReason] = frozenset({"stop", "length", "content_filter"})
    reasoning: bool = True
    details: frozenset[str] = frozenset({"reasoning_tokens", "cached_tokens"})
    usage_first: bool = False
    usage_after: bool = False
    opening_alone: bool = False
    interleaved: bool = True
    empty_arguments: bool = True
    most_calls: int = 3
    named: bool = True
    facts: dict[str, Any] = field(default_factory=dict)

    def facts_of(self, pieces: Iterable[Piece]) -> AnswerFacts:
        return answer_facts(pieces, answer_id="a1", model="m", created=1_790_000_000, **self.facts)

    def encoder(self, pieces: Iterable[Piece]) -> Encoder:
        return MOCKED_VENDORS[self.provider].format.encoder(self.facts_of(pieces))


def ability(provider: str, **settings: Any) -> Ability:
    return Ability(provider, settings.pop("wire", VENDORS[provider].wire), **settings)


ERRING = frozenset[FinishReason]({"stop", "length", "content_filter", "error"})
ABILITIES = {
    "openai": ability("openai", reasons=ERRING),
    "deepseek": ability("deepseek", reasons=ERRING),
    "openai_responses": ability("openai_responses", opening_alone=True),
    "anthropic": ability("anthropic", usage_first=True, opening_alone=True, empty_arguments=False),
    "gemini": ability("gemini", reasons=ERRING, usage_after=True, interleaved=False),
    "cohere": ability(
        "cohere",
        reasons=frozenset({"stop", "length"}),
        details=frozenset({"cached_tokens"}),
        opening_alone=True,
        empty_arguments=False,
    ),
    "ollama": ability("ollama", reasons=frozenset({"stop", "length", "error"}), details=frozenset(), interleaved=False),
    "dashscope": ability("dashscope", usage_after=True),
    "dashscope, cumulative": ability(
        "dashscope", wire=DashScopeWire(cumulative=True), usage_after=True, facts={"cumulative": True}
    ),
    "baidu_v1": ability("baidu_v1", reasoning=False, details=frozenset(), interleaved=False, most_calls=1, named=False),
}
by_ability = pytest.mark.parametrize("able", ABILITIES.values(), ids=ABILITIES.keys())

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
COUNTS = st.integers(0, 10**6)
ARGUMENTS = st.dictionaries(TEXTS, st.one_of(st.integers(-9, 9), TEXTS, st.none(), st.lists(st.booleans())), max_size=3)


@st.composite
def usages(draw: st.DrawFn, able: Ability) -> UsagePiece:
    told, said = draw(COUNTS), draw(COUNTS)
    return UsagePiece(
        told,
        said,
        reasoning_tokens=draw(st.integers(0, said)) if "reasoning_tokens" in able.details else None,
        cached_tokens=draw(st.integers(0, told)) if "cached_tokens" in able.details else None,
    )


@st.composite
def calls(draw: st.DrawFn, able: Ability, index: int) -> list[Piece]:
    """One call's pieces; a format without fragments has it in one."""
    arguments = draw(ARGUMENTS)
    text = msgspec.json.encode(arguments).decode() if arguments or not able.empty_arguments else ""
    call_id = f"call_{index}" if able.named else "as-a1_0"
    if not able.interleaved:
        return [ToolCallPiece(index, call_id, draw(TEXTS), text or "{}")]
    cuts = sorted(draw(st.sets(st.integers(1, len(text) - 1), max_size=3))) if len(text) > 1 else []
    fragments = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    opening = "" if able.opening_alone or draw(st.booleans()) else fragments.pop(0)
    more = [ToolCallPiece(index, arguments_fragment=fragment) for fragment in fragments if fragment]
    return [ToolCallPiece(index, call_id, draw(TEXTS), opening), *more]


@st.composite
def answers(draw: st.DrawFn, able: Ability) -> list[Piece]:
    """A whole answer that the format can say, in the order in which its decoder says it."""
    kinds = [TextPiece, ReasoningPiece] if able.reasoning else [TextPiece]
    said: list[Piece] = draw(st.lists(st.one_of(*(st.builds(kind, TEXTS) for kind in kinds)), max_size=6))
    made = [draw(calls(able, index)) for index in range(draw(st.integers(0, able.most_calls)))]
    said += draw(interleavings(made))
    reason: FinishReason = "tool_calls" if made else draw(st.sampled_from(sorted(able.reasons)))
    counted: list[Piece] = [draw(usages(able))]
    ended: list[Piece] = [FinishPiece(reason)]
    if able.usage_after and draw(st.booleans()):
        counted, ended = ended, counted
    first = [draw(usages(able))] if able.usage_first else []
    return [*first, *said, *counted, *ended]


@st.composite
def interleavings(draw: st.DrawFn, made: list[list[Piece]]) -> list[Piece]:
    """The calls' pieces, mixed, each call in its order and begun in the order of their indices."""
    turns = draw(st.permutations([index for index, call in enumerate(made) for _ in call[1:]]))
    rest = [iter(call[1:]) for call in made]
    return [*(call[0] for call in made), *(next(rest[index]) for index in turns)]


def cut(draw: st.DrawFn, pieces: Sequence[Piece]) -> list[tuple[Piece, ...]]:
    """The pieces in reads of any size."""
    bounds = sorted(draw(st.sets(st.integers(1, len(pieces) - 1)))) if len(pieces) > 1 else []
    return [tuple(pieces[a:b]) for a, b in zip([0, *bounds], [*bounds, len(pieces)], strict=True)]


def recording_of(reads: Sequence[Sequence[Piece]], failure: RecordedFailure | None = None) -> Recording:
    fields = {name: getattr(HEADER, name) for name in HEADER.__struct_fields__} | {"failure": failure}
    timed = tuple(RecordedRead(number * 10**9, tuple(read)) for number, read in enumerate(reads, 1))
    return Recording(RecordingHeader(**fields), timed)


def read_back(able: Ability, recording: Recording) -> Outcome:
    """What the vendor's decoder makes of the encoded recording."""
    pieces = [piece for read in recording.reads for piece in read.pieces]
    parts = [part for _, part in encoded_reads(able.encoder(pieces), recording)]
    return decode(WireCase("", able.wire, parts, []), parts)


def without_continuation(pieces: Iterable[Piece]) -> list[Piece]:
    """What a vendor wants back is its own business: no encoder makes it."""
    return [piece for piece in pieces if not isinstance(piece, ContinuationPiece)]


@by_ability
@given(data=st.data())
def test_what_is_encoded_is_decoded_to_the_same(able: Ability, data: st.DataObject) -> None:
    pieces = data.draw(answers(able))
    outcome = read_back(able, recording_of(data.draw(st.composite(cut)(pieces))))
    assert outcome.error is None
    assert without_continuation(outcome.pieces) == pieces


@by_ability
@given(data=st.data())
def test_each_read_says_what_it_said(able: Ability, data: st.DataObject) -> None:
    """At its own time: no read's text comes with another one."""
    recording = recording_of(data.draw(st.composite(cut)(data.draw(answers(able)))))
    pieces = [piece for read in recording.reads for piece in read.pieces]
    decoder = able.wire.decoder()
    texts = {read.at_ns: [p for p in read.pieces if isinstance(p, TextPiece)] for read in recording.reads}
    for at_ns, part in encoded_reads(able.encoder(pieces), recording):
        decoded: list[Piece] = []
        decoder.feed(part, decoded)
        assert [piece for piece in decoded if isinstance(piece, TextPiece)] == texts.pop(at_ns)
    assert not any(texts.values())


def meaning(pieces: Iterable[Piece]) -> dict[str, Any]:
    """What an answer says, however it was cut and in whichever order the counts came."""
    recording = recording_of([tuple(without_continuation(pieces))], RecordedFailure(10**9, "upstream.server", ""))
    whole = msgspec.structs.asdict(whole_answer(recording))
    calls = [
        (number, call.call_id, call.name, json.loads(call.arguments_fragment or "{}"))
        for number, call in enumerate(sorted(whole["calls"], key=lambda call: int(call.index)))
    ]
    return whole | {"calls": calls}


GOOD_CASES = [case for case in CASES if case.error is None]


def ability_for(case: WireCase) -> Ability:
    """The format of the case; a vendor's dialect makes no difference to what is said."""
    kind = type(case.wire.decoder())
    cumulative = "dashscope, cumulative" if "cumulative" in case.name else "dashscope"
    return next(
        able
        for name, able in ABILITIES.items()
        if type(able.wire.decoder()) is kind and (not name.startswith("dashscope") or name == cumulative)
    )


def sayable(case: WireCase) -> bool:
    """Whether the format has a word for how this answer ends."""
    reasons = [piece.reason for piece in case.pieces if isinstance(piece, FinishPiece)]
    return not reasons or reasons[-1] in {*ability_for(case).reasons, "tool_calls"}


@pytest.mark.parametrize("case", [case for case in GOOD_CASES if sayable(case)], ids=lambda case: case.name)
def test_the_vendors_own_answers_come_back(case: WireCase) -> None:
    able = ability_for(case)
    pieces = without_continuation(case.pieces)
    outcome = read_back(able, recording_of([tuple(pieces)]))
    assert outcome.error is None
    expected, found = meaning(pieces), meaning(outcome.pieces)
    if not able.named:
        expected["calls"] = [(number, f"as-a1_{number}", *rest) for number, _, *rest in expected["calls"]]
    assert found == expected


def pieces_of(pieces: Iterable[Piece], kind: type[FinishPiece]) -> list[FinishPiece]:
    return [piece for piece in pieces if isinstance(piece, kind)]


@by_ability
@pytest.mark.parametrize("name", names())
def test_recordings_keep_their_texts_and_times(able: Ability, name: str) -> None:
    recording = load(name)
    outcome = read_back(able, recording)
    assert "".join(piece.text for piece in outcome.pieces if isinstance(piece, TextPiece)) == recording.text
    pieces = [piece for read in recording.reads for piece in read.pieces]
    times = [at for at, _ in encoded_reads(able.encoder(pieces), recording)]
    # A format without fragments sends a call when it is whole: at the time of its last piece.
    waiting = {read.at_ns for read in recording.reads if all(isinstance(p, ToolCallPiece) for p in read.pieces)}
    recorded = [read.at_ns for read in recording.reads]
    assert [at for at in recorded if at in times or at not in waiting] == times
    assert not waiting or name == "demo-tools"


UNKINDLY = {"cohere", "ollama"}
"""Formats whose errors in the stream have no kind."""


@by_ability
@pytest.mark.parametrize("code", sorted(REPORTED_CODES))
def test_a_failure_is_reported_as_the_vendor_does(able: Ability, code: ProviderErrorCode) -> None:
    failure = RecordedFailure(5 * 10**9, code, "the model's server reported an error: no more of that")
    recording = recording_of([(TextPiece("Half"),)], failure)
    outcome = read_back(able, recording)
    assert TextPiece("Half") in outcome.pieces
    told = {*UNKINDLY, *(["baidu_v1"] if code == "upstream.content_policy" else [])}
    assert outcome.error == ("upstream.server" if able.provider in told else code)


@by_ability
@pytest.mark.parametrize("code", ["upstream.truncated", "upstream.connection", "timeout.idle"])
def test_of_an_answer_that_broke_off_there_is_nothing_more(able: Ability, code: ProviderErrorCode) -> None:
    outcome = read_back(able, recording_of([(TextPiece("Half"),)], RecordedFailure(5 * 10**9, code, "cut")))
    assert outcome.error == "upstream.truncated"


@by_ability
@pytest.mark.parametrize("reason", ["content_filter", "error"])
def test_an_end_without_a_word_is_a_failure(able: Ability, reason: FinishReason) -> None:
    outcome = read_back(able, recording_of([(TextPiece("a"), FinishPiece(reason))]))
    assert (outcome.error is None) == (reason in able.reasons)


def test_the_message_is_the_vendors_own() -> None:
    failure = RecordedFailure(0, "upstream.overloaded", "the model's server answered HTTP 529: Overloaded")
    able = ABILITIES["anthropic"]
    with pytest.raises(ProviderError, match=r"reported an error: Overloaded$"):
        able.wire.decoder().feed(
            b"".join(part for _, part in encoded_reads(able.encoder([]), recording_of([], failure))), []
        )


def test_usage_only_for_those_who_ask() -> None:
    pieces = (TextPiece("a"), FinishPiece("stop"), UsagePiece(1, 2))
    able = ability("openai", facts={"asks_usage": False})
    assert UsagePiece(1, 2) not in read_back(able, recording_of([pieces])).pieces
    parts = b"".join(part for _, part in encoded_reads(able.encoder(pieces), recording_of([pieces])))
    assert b"usage" not in parts


def test_raw_reads_are_the_bytes_as_they_came() -> None:
    reads = (RecordedRead(1, raw=b": hi\n\n"), RecordedRead(2, (TextPiece("a"),), b"data: a"), RecordedRead(3, raw=b""))
    failure = RecordedFailure(4, "upstream.truncated", "cut")
    fields = {name: getattr(HEADER, name) for name in HEADER.__struct_fields__} | {"failure": failure}
    recording = Recording(RecordingHeader(**fields), reads[:2])
    assert list(raw_reads(recording)) == [(1, b": hi\n\n"), (2, b"data: a"), (4, b"")]


def test_calls_are_joined_where_their_last_fragment_was() -> None:
    reads = (
        RecordedRead(1, (ToolCallPiece(0, "a", "f", "{"), ToolCallPiece(1, "b", "g"))),
        RecordedRead(2, (ToolCallPiece(1, arguments_fragment="{}"), TextPiece("so"))),
        RecordedRead(3, (ToolCallPiece(0, arguments_fragment="}"),)),
    )
    assert [read.pieces for read in with_whole_calls(reads)] == [
        (),
        (ToolCallPiece(1, "b", "g", "{}"), TextPiece("so")),
        (ToolCallPiece(0, "a", "f", "{}"),),
    ]


def test_what_a_format_cannot_say_is_left_out() -> None:
    """The second call of Baidu's first API, what another vendor wants back, an empty text."""
    first, second = ToolCallPiece(0, "as-a1_0", "f", "{}"), ToolCallPiece(1, "b", "g", "{}")
    pieces = (TextPiece(""), ContinuationPiece({"x": 1}), first, second, FinishPiece("tool_calls"))
    outcome = read_back(ABILITIES["baidu_v1"], recording_of([pieces]))
    assert outcome.pieces == [first, FinishPiece("tool_calls")]


PIECES = (
    ReasoningPiece("Hm."),
    TextPiece("Let me "),
    TextPiece("look."),
    ToolCallPiece(0, "call_1", "weather", '{"city":'),
    ToolCallPiece(0, arguments_fragment='"上海"}'),
    UsagePiece(9, 7, cached_tokens=4),
    FinishPiece("tool_calls"),
)


def test_a_chat_completion_in_one() -> None:
    facts = AnswerFacts(answer_id="a1", model="m", created=7)
    assert chat_completion(whole_answer(recording_of([PIECES])), facts) == {
        "id": "chatcmpl-a1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Let me look.",
                    "refusal": None,
                    "reasoning_content": "Hm.",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"上海"}'},
                        }
                    ],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 7,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_a_message_in_one() -> None:
    facts = AnswerFacts(answer_id="a1", model="m")
    body = anthropic_message(whole_answer(recording_of([PIECES])), facts)
    assert msgspec.json.decode(msgspec.json.encode(body)) == {
        "id": "msg_a1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "上海"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 7, "cache_read_input_tokens": 4},
    }


def test_an_event_has_its_name() -> None:
    assert event({"a": 1}) == b'data: {"a":1}\n\n'
    assert event({}, "ping") == b"event: ping\ndata: {}\n\n"
