from __future__ import annotations

import itertools
import re

import msgspec
import pytest

from benchmarks.bench.scripts import END_OF_BODY, EVENT_BYTES, EVENTS, HEAD, SECOND, Script, content_event, script_of
from benchmarks.bench.stamps import TO_FILL, Finder
from benchmarks.bench.traces import content_offsets_ns, gpt4o_streams, mooncake_arrivals


def whole(script: Script) -> bytes:
    assert script.ending is not None
    return script.opening + EVENTS.between(0, max(script.count - 1, 0)) + script.ending


def chunks(data: bytes) -> list[str]:
    """The payloads of the server-sent events, each of which has to be an HTTP chunk of its own."""
    assert data.startswith(HEAD)
    assert data.endswith(END_OF_BODY)
    body, payloads = data.removeprefix(HEAD), []
    while (size := int(body[: body.index(b"\r\n")], 16)) > 0:
        start = body.index(b"\r\n") + 2
        event = body[start : start + size].decode()
        payloads.append(event.removeprefix("data: ").removesuffix("\n\n"))
        assert event == f"data: {payloads[-1]}\n\n"
        body = body[start + size + 2 :]
    return payloads


def test_events_are_all_of_one_length() -> None:
    lengths = {len(content_event(number, last=last)) for number in (0, 9, 99_999) for last in (False, True)}
    assert lengths == {EVENT_BYTES}


@pytest.mark.parametrize("name", ["one", "flood-200", "paced-20x3", "gpt4o-7", "mooncake-50x5", "tools-2"])
def test_an_answer_is_what_openai_would_send(name: str) -> None:
    script = script_of(name, 3)
    *payloads, done = chunks(whole(script))
    assert done == "[DONE]"
    decoded = [msgspec.json.decode(payload) for payload in payloads]
    assert decoded[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert decoded[-1]["choices"] == []
    assert decoded[-1]["usage"]["completion_tokens"] == (script.count or 12)
    finish = decoded[-2]["choices"][0]
    assert (finish["delta"], finish["finish_reason"]) == ({}, "tool_calls" if name == "tools-2" else "stop")
    stamps = Finder().feed(whole(script).replace(TO_FILL, b"000003.000000000000000009"))
    assert [int(number) for number, *_ in stamps] == [*range(script.count)]
    assert [mark for *_, mark in stamps] == [b";"] * (script.count - 1) + [b"!"] * bool(script.count)


def test_two_tool_calls_then_an_answer() -> None:
    payloads = [msgspec.json.decode(payload) for payload in chunks(whole(script_of("tools-2", 0)))[1:-3]]
    calls: dict[int, str] = {}
    for payload in payloads:
        for call in payload["choices"][0]["delta"]["tool_calls"]:
            calls[call["index"]] = calls.get(call["index"], "") + call["function"]["arguments"]
    assert {index: msgspec.json.decode(text) for index, text in calls.items()} == {
        0: {"expression": "24 * 60 * 60"},
        1: {},
    }
    assert script_of("tools-2", 0, tools_answered=True).count == 40
    assert script_of("tools-2-flood-7", 0, tools_answered=True) is script_of("flood-7", 0)


def test_paced() -> None:
    script = script_of("paced-20x4", 1)
    assert list(script.dues) == [0, SECOND // 20, SECOND // 10, 3 * SECOND // 20]
    shifts = sorted(script.shift_ns(tag) for tag in range(100))
    gaps = [after - before for before, after in itertools.pairwise([*shifts, SECOND // 20])]
    assert shifts[0] == 0
    assert 0 < min(gaps) <= max(gaps) < 3 * (SECOND // 20) / 100  # spread evenly over the period


def test_recorded() -> None:
    stream = gpt4o_streams()[7]
    offsets = content_offsets_ns(stream)
    assert len(offsets) == stream.content_chunks
    assert offsets == sorted(offsets)
    assert offsets[-1] <= round((stream.ttfb_ms + sum(stream.gaps_ms)) * 1e6) + 1
    assert list(script_of("gpt4o", 7).dues) == list(script_of("gpt4o-7", 3).dues) == offsets
    assert script_of("gpt4o", 7 + 160) is script_of("gpt4o", 7)
    assert (len(gpt4o_streams()), sum(stream.content_chunks for stream in gpt4o_streams())) == (160, 44_823)


def test_lengths_of_mooncake() -> None:
    lengths = [script_of("mooncake-50", tag).count for tag in range(5)]
    assert lengths == [arrival.output_tokens for arrival in mooncake_arrivals()[:5]]
    assert [script_of("mooncake-50x400", tag).count for tag in range(5)] == [min(length, 400) for length in lengths]
    assert len(mooncake_arrivals()) == 2000


@pytest.mark.parametrize("name", ["stalled", "stalled-5", "silent"])
def test_answers_that_do_not_end(name: str) -> None:
    script = script_of(name, 0)
    assert script.ending is None
    assert script.count == {"stalled": 1, "stalled-5": 5, "silent": 0}[name]
    assert bool(script.opening) == (name != "silent")


@pytest.mark.parametrize(
    "name", ["", "two", "flood", "flood-0", "flood-2x3", "paced-20", "paced-0x5", "one-1", "mooncake", "flood-1000000"]
)
def test_no_such_answer(name: str) -> None:
    with pytest.raises(ValueError, match=re.compile("no such|with|events|rate|second")):
        script_of(name, 0)
