"""What the upstream answers, by the name that a request gives: prepared bytes, and the times of its events.

| name | answer |
|---|---|
| `one` | one event at once |
| `flood-200` | 200 events as fast as they go |
| `paced-20x100` | 20 events a second, 100 of them; when the first comes differs by the stream's tag |
| `gpt4o`, `gpt4o-7` | the times of a recorded GPT-4o answer: the one of the stream's tag, or number 7 |
| `mooncake-50`, `mooncake-50x400` | 50 a second, as many as the tag's Mooncake request had tokens; at most 400 |
| `stalled`, `stalled-5` | 1 or 5 events at once, then nothing more |
| `silent` | not even a response head |
| `tools-2`, `tools-2-flood-40` | two tool calls at once; asked with their results, `paced-50x40` or the named answer |
"""

from __future__ import annotations

import re
from array import array
from functools import cache

import msgspec

from benchmarks.bench.stamps import prepared
from benchmarks.bench.traces import content_offsets_ns, gpt4o_streams, mooncake_arrivals

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
END_OF_BODY = b"0\r\n\r\n"
EVENT_DATA_BYTES = 345
"""Of an OpenAI chunk as recorded (366 on the wire, with TLS and framing); its own padding does the same."""
LONGEST = 100_000
SECOND = 1_000_000_000
_GOLDEN = 0.6180339887498949
_TOOLS_ANSWER = "paced-50x40"


class Script(msgspec.Struct, frozen=True):
    """One answer. Of its events, the last is in ``ending``."""

    opening: bytes
    """Response head and whatever is no content event."""
    opening_ns: int
    """When the opening is due, from the request on."""
    dues: array[int]
    """When the events are due, from the request and the stream's shift on; may hold more than ``count``."""
    count: int
    """How many events there are."""
    ending: bytes | None
    """The last event and what follows it; None of one that never ends."""
    timed: bool = False
    """Whether the events have times of their own; else they go as fast as they can."""
    period_ns: int = 0
    """Tags shift the events by a part of it, so that streams do not move in step."""

    def shift_ns(self, tag: int) -> int:
        """How much later than ``dues`` the events of this stream are."""
        return int(self.period_ns * (tag * _GOLDEN % 1))


def chunk_of(delta: str, finish: str = "null", more: str = "") -> str:
    """One ``chat.completion.chunk`` as JSON."""
    return (
        '{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1774800000,"model":"gpt-4o-2024-08-06",'
        '"service_tier":"default","system_fingerprint":"fp_bench",'
        f'"choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}],"usage":null{more}}}'
    )


def frame(data: str) -> bytes:
    """One server-sent event in an HTTP chunk of its own."""
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def content_event(number: int, *, last: bool = False) -> bytes:
    """A content event with its stamp to be filled in; all are of the same length."""
    content = chunk_of(f'{{"content":"{prepared(number, last=last)}"}}')
    padding = "x" * (EVENT_DATA_BYTES - len(content) - len(',"obfuscation":""') - len("data: \n\n"))
    return frame(f'{content[:-1]},"obfuscation":"{padding}"}}')


EVENT_BYTES = len(content_event(0))


class _Events:
    """The bytes of all events but the last, whatever the answer: number n is at n * EVENT_BYTES."""

    def __init__(self) -> None:
        self._bytes = b""

    def at_least(self, count: int) -> None:
        """Prepare so many."""
        if (have := len(self._bytes) // EVENT_BYTES) < count:
            self._bytes += b"".join(map(content_event, range(have, count)))

    def between(self, first: int, end: int) -> bytes:
        """The events from ``first`` up to, and without, ``end``."""
        return self._bytes[first * EVENT_BYTES : end * EVENT_BYTES]


EVENTS = _Events()


def _tail(events: int, finish: str) -> bytes:
    usage = f'{{"prompt_tokens":20,"completion_tokens":{events},"total_tokens":{20 + events}}}'
    ended = chunk_of("{}", f'"{finish}"')
    counted = re.sub(r'"choices":.*', f'"choices":[],"usage":{usage}}}', chunk_of("{}"))
    return frame(ended) + frame(counted) + frame("[DONE]") + END_OF_BODY


_ROLE = frame(chunk_of('{"role":"assistant","content":"","refusal":null}'))


def _answer(
    dues: array[int], count: int, *, opening_ns: int = 0, period_ns: int = 0, timed: bool = True, ends: bool = True
) -> Script:
    if not 1 <= count <= LONGEST:
        raise ValueError(f"an answer has 1 to {LONGEST} events, not {count}")
    EVENTS.at_least(count)
    ending = content_event(count - 1, last=True) + _tail(count, "stop") if ends else None
    return Script(HEAD + _ROLE, opening_ns, dues, count, ending, timed, period_ns)


def _at_once(count: int, *, ends: bool = True) -> Script:
    return _answer(array("q", bytes(8 * count)), count, timed=False, ends=ends)


def _paced(rate: int, count: int) -> Script:
    return _answer(_paced_dues(rate, count), count, period_ns=SECOND // rate)


@cache
def _paced_dues(rate: int, count: int) -> array[int]:
    if not 1 <= rate <= 100_000:
        raise ValueError(f"{rate} events a second")
    return array("q", [number * SECOND // rate for number in range(count)])


@cache
def _gpt4o(number: int) -> Script:
    stream = gpt4o_streams()[number]
    offsets = array("q", content_offsets_ns(stream))
    return _answer(offsets, len(offsets), opening_ns=round(stream.ttfb_ms * 1_000_000))


@cache
def _mooncake(rate: int, count: int) -> Script:
    return _answer(_paced_dues(rate, LONGEST // 10), count, period_ns=SECOND // rate)


@cache
def _tool_calls() -> Script:
    calls = (
        ("call_bench_1", "calculator", ('{"expression": "', '24 * 60 * 60"}')),
        ("call_bench_2", "current_time", ("{", "}")),
    )
    frames = [HEAD, _ROLE]
    for index, (call_id, name, fragments) in enumerate(calls):
        function = f'"id":"{call_id}","type":"function","function":{{"name":"{name}","arguments":""}}'
        frames.append(frame(chunk_of(f'{{"tool_calls":[{{"index":{index},{function}}}]}}')))
        for fragment in fragments:
            arguments = msgspec.json.encode(fragment).decode()
            call = f'{{"index":{index},"function":{{"arguments":{arguments}}}}}'
            frames.append(frame(chunk_of(f'{{"tool_calls":[{call}]}}')))
    return Script(b"".join(frames), 0, array("q"), 0, _tail(12, "tool_calls"))


SILENT = Script(b"", 0, array("q"), 0, None)

_NAME = re.compile(r"(?P<kind>one|flood|paced|gpt4o|mooncake|stalled|silent)(?:-(?P<n>\d+)(?:x(?P<m>\d+))?)?")


def script_of(name: str, tag: int, *, tools_answered: bool = False) -> Script:
    """The answer of that name for a stream. Raises ``ValueError`` for a name that is none."""
    if name.startswith("tools-2"):
        if not tools_answered:
            return _tool_calls()
        name = name.removeprefix("tools-2").removeprefix("-") or _TOOLS_ANSWER
    found = _NAME.fullmatch(name)
    if not found:
        raise ValueError(f"no such answer: {name}")
    n, m = (None if number is None else int(number) for number in found.group("n", "m"))
    if found["kind"] in ("gpt4o", "mooncake"):
        return _recorded(found["kind"], tag, n, m)
    return _constant(found["kind"], n, m)


@cache
def _constant(kind: str, n: int | None, m: int | None) -> Script:
    match kind, n, m:
        case "one", None, None:
            return _at_once(1)
        case "flood", int(), None:
            return _at_once(n)
        case "paced", int(), int():
            return _paced(n, m)
        case "stalled", _, None:
            return _at_once(n or 1, ends=False)
        case "silent", None, None:
            return SILENT
    raise ValueError(f"{kind} with {n} and {m}")


def _recorded(kind: str, tag: int, n: int | None, m: int | None) -> Script:
    if kind == "gpt4o":
        return _gpt4o((tag if n is None else n) % len(gpt4o_streams()))
    if n is None:
        raise ValueError("mooncake without a rate")
    arrivals = mooncake_arrivals()
    tokens = arrivals[tag % len(arrivals)].output_tokens
    return _mooncake(n, max(1, min(tokens, m or LONGEST // 10)))
