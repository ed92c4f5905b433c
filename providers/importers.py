"""Recordings from the files of other tools: aimock's fixtures, vLLM's benchmark results, traces of arrivals.

Sources: CopilotKit/aimock, ``src/types.ts`` (``FixtureFile``, ``StreamingProfile``, ``RecordedTimings``);
vllm-project/vllm, ``vllm/benchmarks/serve.py`` (``--save-result --save-detailed``); the traces' own ``schema``. What a
file leaves to chance (aimock's jitter) comes from a seed, so that the same file gives the same recordings.
"""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from engine.pieces import FinishPiece, FinishReason, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.usage import estimate_tokens

from .openai_chat import FINISH_REASONS
from .recording import FORMAT, RecordedFailure, RecordedRead, Recording, RecordingError, RecordingHeader, load

UNDATED = datetime.date(1970, 1, 1)
"""For files that do not say when they were recorded."""

CHUNK_CHARS = 20
"""aimock's own chunk size."""

TRACE_TEXT = "demo-93s"
"""Whose text traces get, which have none: this recording's, from its beginning, over and over."""


class UnknownImportError(ValueError):
    """The file is of no format that is known here, or does not keep to it; whoever names it is at fault."""


def import_recordings(data: bytes, origin: str, *, seed: int = 0) -> list[Recording]:
    """The recordings that a file holds, in its order; their names count from ``imported-1``.

    Args:
        data: the file, which is JSON.
        origin: what it is called, for the headers and for errors.
        seed: of what the file leaves to chance.

    Raises:
        UnknownImportError: it is of no known format, malformed, or without an answer that streams.
    """
    try:
        file = msgspec.json.decode(data, type=dict[str, Any])
        importer = next((importer for is_its, importer in _FORMATS if is_its(file)), None)
        if importer is None:
            raise UnknownImportError(f"{origin}: neither aimock fixtures nor a vLLM benchmark nor a trace")
        recordings = list(importer(file, origin, random.Random(seed)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, RecordingError) as error:
        raise UnknownImportError(f"{origin}: {error}") from error
    if not recordings:
        raise UnknownImportError(f"{origin}: there is no answer that streams")
    return [
        Recording(msgspec.structs.replace(recording.header, name=f"imported-{number}"), recording.reads)
        for number, recording in enumerate(recordings, 1)
    ]


def _header(origin: str, **fields: Any) -> RecordingHeader:
    told: dict[str, Any] = {
        "title": f"imported from {origin}",
        "model": "unknown",
        "recorded": UNDATED,
        "source": origin,
        "licence": "",
        "prompt": "",
    }
    return RecordingHeader(format=FORMAT, name="imported", **(told | fields))


class _ToolCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] | list[Any]
    id: str | None = None

    @property
    def text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else msgspec.json.encode(self.arguments).decode()


class _Block(msgspec.Struct):
    type: str
    text: str = ""
    name: str = ""
    arguments: str | dict[str, Any] | list[Any] = ""
    id: str | None = None


class _Response(msgspec.Struct, rename="camel"):
    content: str | dict[str, Any] | list[Any] | None = None
    reasoning: str = ""
    tool_calls: list[_ToolCall] = []
    blocks: list[_Block] = []
    model: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = {}


class _Profile(msgspec.Struct):
    ttft: float | None = None
    tps: float | None = None
    jitter: float = 0.0


class _Timings(msgspec.Struct, rename="camel"):
    ttft_ms: float
    inter_chunk_delays_ms: list[float]


class _Match(msgspec.Struct, frozen=True, rename="camel"):
    user_message: str | None = None
    model: str | None = None


class _Fixture(msgspec.Struct, rename="camel"):
    response: _Response
    match: _Match = _Match()
    latency: float = 0.0
    chunk_size: int = CHUNK_CHARS
    streaming_profile: _Profile | None = None
    recorded_timings: _Timings | None = None
    replay_speed: float = 1.0


def _aimock(file: Mapping[str, Any], origin: str, chance: random.Random) -> Iterator[Recording]:
    """One recording a fixture that streams text or tool calls; images, embeddings and errors are left out."""
    for number, raw in enumerate(file["fixtures"], 1):
        response = raw.get("response") if isinstance(raw, dict) else None
        if not isinstance(response, dict) or not response.keys() & {"content", "toolCalls", "blocks"}:
            continue
        fixture = msgspec.convert(raw, _Fixture)
        pieces = [*_fixture_pieces(fixture)]
        times = itertools.islice(_fixture_times(fixture, chance), len(pieces))
        reads = [RecordedRead(_ns(at), (piece,)) for at, piece in zip(times, pieces, strict=True)]
        end = RecordedRead(reads[-1].at_ns if reads else 0, (_fixture_usage(fixture), _fixture_finish(fixture)))
        header = _header(
            f"{origin}, fixture {number}",
            provider="aimock",
            model=fixture.response.model or fixture.match.model or "unknown",
            prompt=fixture.match.user_message or "",
        )
        yield Recording(header, (*reads, end))


def _fixture_pieces(fixture: _Fixture) -> Iterator[Piece]:
    """The answer in chunks of ``chunkSize`` characters, arguments too, as aimock cuts them."""
    response, size = fixture.response, max(1, fixture.chunk_size)
    yield from (ReasoningPiece(part) for part in _parts(response.reasoning, size))
    content = response.content if isinstance(response.content, str | None) else _as_text(response.content)
    blocks = response.blocks or [
        _Block("text", text=content or ""),
        *(_Block("toolCall", "", call.name, call.text, call.id) for call in response.tool_calls),
    ]
    calls = itertools.count()
    for block in blocks:
        if block.type == "text":
            yield from (TextPiece(part) for part in _parts(block.text, size))
            continue
        index = next(calls)
        yield ToolCallPiece(index, block.id or f"call_{index}", block.name)
        text = block.arguments if isinstance(block.arguments, str) else _as_text(block.arguments)
        yield from (ToolCallPiece(index, arguments_fragment=part) for part in _parts(text, size))


def _fixture_times(fixture: _Fixture, chance: random.Random) -> Iterator[float]:
    """Seconds from the request to each chunk, without end; what was recorded counts before what is made up."""
    timings, profile = fixture.recorded_timings, fixture.streaming_profile
    if timings is not None:
        delays = [timings.ttft_ms, *timings.inter_chunk_delays_ms]
        delays_ms: Iterator[float] = itertools.chain(delays, itertools.repeat(delays[-1]))
        yield from itertools.accumulate(delay / 1000 / fixture.replay_speed for delay in delays_ms)
    elif profile is not None:
        gap = 1 / profile.tps if profile.tps else fixture.latency / 1000
        first = gap if profile.ttft is None else profile.ttft / 1000
        plain = itertools.chain([first], itertools.repeat(gap))
        yield from itertools.accumulate(max(0.0, at * (1 + chance.uniform(-1, 1) * profile.jitter)) for at in plain)
    else:
        yield from itertools.accumulate(itertools.repeat(fixture.latency / 1000))


def _fixture_usage(fixture: _Fixture) -> UsagePiece:
    """The counts in whichever vendor's words; what a fixture does not tell is estimated, as aimock does."""
    usage, response = fixture.response.usage, fixture.response
    said = "".join([response.reasoning, _as_text(response.content), *(call.text for call in response.tool_calls)])
    told = (usage.get(name) for name in ("prompt_tokens", "input_tokens", "promptTokenCount"))
    made = (usage.get(name) for name in ("completion_tokens", "output_tokens", "candidatesTokenCount"))
    return UsagePiece(
        next((count for count in told if isinstance(count, int)), estimate_tokens(fixture.match.user_message or "")),
        next((count for count in made if isinstance(count, int)), estimate_tokens(said)),
    )


def _fixture_finish(fixture: _Fixture) -> FinishPiece:
    calls = fixture.response.tool_calls or any(block.type != "text" for block in fixture.response.blocks)
    default: FinishReason = "tool_calls" if calls else "stop"
    return FinishPiece(FINISH_REASONS.get(fixture.response.finish_reason or "", default))


class _Benchmark(msgspec.Struct):
    """``vllm bench serve --save-result --save-detailed``; times in seconds."""

    ttfts: list[float]
    itls: list[list[float]]
    generated_texts: list[str]
    input_lens: list[int]
    output_lens: list[int]
    errors: list[str | None] = []
    model_id: str = "unknown"
    date: str = ""


def _vllm(file: Mapping[str, Any], origin: str, _: random.Random) -> Iterator[Recording]:
    """One recording a request, each gap as it was measured; what failed before its first token says nothing."""
    run = msgspec.convert(file, _Benchmark)
    errors = run.errors or [None] * len(run.ttfts)
    rows = zip(run.ttfts, run.itls, run.generated_texts, run.input_lens, run.output_lens, errors, strict=False)
    for number, (ttft, gaps, text, told, said, error) in enumerate(rows, 1):
        times = list(itertools.accumulate([ttft, *gaps]))
        parts = _spread(text, len(times))
        reads = [RecordedRead(_ns(at), (TextPiece(part),)) for at, part in zip(times, parts, strict=True) if part]
        if error and not reads:
            continue
        failure = RecordedFailure(_ns(times[-1]), "upstream.server", error[:300]) if error else None
        end: tuple[Piece, ...] = () if error else (UsagePiece(told, said), FinishPiece("stop"))
        last = (RecordedRead(_ns(times[-1]), end),) if end else ()
        header = _header(
            f"{origin}, request {number}",
            provider="openai_compatible",
            model=run.model_id,
            recorded=_day(run.date),
            failure=failure,
        )
        yield Recording(header, (*reads, *last))


class _Stream(msgspec.Struct):
    """Of a trace; milliseconds. TLS records begin with the head of the answer, tokens with the first one."""

    gaps_ms: list[float]
    ttfb_ms: float | None = None
    ttft_ms: float | None = None
    model: str = "unknown"


class _TraceSource(msgspec.Struct, frozen=True):
    repo: str = ""
    path: str = ""
    licence: str = ""
    recorded: str = ""


class _Trace(msgspec.Struct):
    schema: str
    streams: list[_Stream]
    source: _TraceSource = _TraceSource()


_TRACED = {"tls-record-arrivals/1": ("openai", 1), "token-arrivals/1": ("ollama", 0)}
"""Whose arrivals a trace has, and how many of them come before the first text."""


def _trace(file: Mapping[str, Any], origin: str, _: random.Random) -> Iterator[Recording]:
    """One recording a stream: its arrivals, each with the next words of a text of ours."""
    trace = msgspec.convert(file, _Trace)
    provider, heads = _TRACED[trace.schema]
    words = [p for read in load(TRACE_TEXT).reads for p in read.pieces if isinstance(p, TextPiece)]
    for number, stream in enumerate(trace.streams, 1):
        first = stream.ttft_ms if stream.ttfb_ms is None else stream.ttfb_ms
        arrivals = [*itertools.accumulate([(first or 0.0) / 1000, *(gap / 1000 for gap in stream.gaps_ms)])][heads:]
        if not arrivals:
            continue
        said = itertools.cycle(words)
        reads = [RecordedRead(_ns(at), (next(said),)) for at in arrivals]
        end = RecordedRead(_ns(arrivals[-1]), (UsagePiece(0, len(arrivals)), FinishPiece("stop")))
        header = _header(
            f"{origin}, stream {number}",
            provider=provider,
            model=stream.model,
            recorded=_day(trace.source.recorded),
            licence=f"{trace.source.licence} for the times" if trace.source.licence else "",
            note="The times are the trace's; the text, which it does not have, is ours.",
        )
        yield Recording(header, (*reads, end))


Importer = Callable[[Mapping[str, Any], str, random.Random], Iterator[Recording]]

_FORMATS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Importer], ...] = (
    (lambda file: isinstance(file.get("fixtures"), list), _aimock),
    (lambda file: {"ttfts", "itls", "generated_texts"} <= file.keys(), _vllm),
    (lambda file: file.get("schema") in _TRACED, _trace),
)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _day(text: str) -> datetime.date:
    """The day of ``20261122-101500`` or ``2026-11-22 10:15``; 1970 for anything else."""
    digits = text.replace("-", "")[:8]
    try:
        return datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return UNDATED


def _as_text(value: Any) -> str:
    """Text as it is, nothing as none, and what aimock lets its users write as JSON as JSON text."""
    return value if isinstance(value, str) else "" if value is None else msgspec.json.encode(value).decode()


def _parts(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def _spread(text: str, count: int) -> Sequence[str]:
    """The text in so many parts of nearly the same length; the same each time, some empty if it is short."""
    bounds = [number * len(text) // count for number in range(count + 1)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]
