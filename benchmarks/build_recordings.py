"""Build the packaged recordings from recorded traffic: run once, kept to show where they come from.

    python -m benchmarks.build_recordings TRACES [OUT]

``TRACES`` is a directory with ``openai_gpt4o_tls_records.json`` and ``ollama_llama3_token_arrivals.json`` as
``providers/recordings/ATTRIBUTION.md`` describes them; ``OUT`` is ``providers/recordings`` unless given. The times are
theirs; the texts, which the traces do not hold, are ours, in ``benchmarks/recording_texts/``.
"""

from __future__ import annotations

import datetime
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import msgspec

from engine.pieces import FinishPiece, Piece, TextPiece, ToolCallPiece, UsagePiece
from providers.recording import FORMAT, RecordedRead, Recording, RecordingHeader, dump

HERE = pathlib.Path(__file__).parent
TEXTS = HERE / "recording_texts"
RECORDINGS = HERE.parent / "providers" / "recordings"

Reads: TypeAlias = list[tuple[int, int]]
"""For each upstream read: nanoseconds from the request, and the number of content chunks that it completed."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What the trace does not say about a recording; the text is in ``recording_texts/{name}.md``."""

    name: str
    title: str
    prompt: str


GPT4O_SPECS = {
    "441e6552cef2-0": Spec(
        name="gpt4o-demo",
        title="GPT-4o, 4.4 s: what structured concurrency is good for",
        prompt="What is structured concurrency, and why would a chat server want it?",
    ),
    "693bac1c2a1b-0": Spec(
        name="gpt4o-13s",
        title="GPT-4o, 13.2 s: the slowest of 160 recorded answers",
        prompt="My streamed answers arrive in lumps. How do I find out why?",
    ),
    "66e24daa2403-0": Spec(
        name="gpt4o-short",
        title="GPT-4o, 1.0 s: a short answer",
        prompt="In two or three sentences: why does TTFB matter?",
    ),
}

TOOLS_PROMPT = "How many answers of 93 seconds fit into a day, one after another? And what time is it?"
TOOLS_STREAM = "66e24daa2403-0"
TOOLS_SPECS = (
    Spec(name="demo-tools", title="An agent's first step: two tool calls", prompt=TOOLS_PROMPT),
    Spec(name="demo-tools-step-2", title="Its second step: the answer", prompt=TOOLS_PROMPT),
)
TOOLS_CALLS = (
    ("call_1", "calculator", ('{"expression": "', "24 * 60 * 60", ' / 93"}')),
    ("call_2", "current_time", ('{"timezone": "', "UTC", '"}')),
)

OLLAMA_SPEC = Spec(
    name="ollama-llama3",
    title="Llama 3 on a laptop, 1.9 s: one token a read",
    prompt="Tell me a joke about streaming.",
)
OLLAMA_CASSETTE = "test_chat/test_ollama_streaming_chat_legacy.yaml"

DEMO_SPEC = Spec(
    name="demo-93s",
    title="A long answer at a laptop's pace, exactly 93 s",
    prompt="How does a streaming agent server work, from the first byte to the last?",
)
DEMO_NS = 93_000_000_000

# Roughly what vendors' tokenizers do to prose: a word keeps its leading space; a CJK character, up to three digits, a
# mark ("**" is one) and a run of line ends stand alone.
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]| ?[A-Za-zÀ-ɏЀ-ӿ]+| ?\d{1,3}|\n+| ?([^\w\s])\1*| ?\S|\s+")
LONGEST_WORD = 12
WORD_PART = 6


def tokenize(text: str) -> list[str]:
    """Cut a text into token-like pieces; joined again they are the text."""
    tokens: list[str] = []
    for match in TOKEN.finditer(text):
        token = match[0]
        if len(token) > LONGEST_WORD and token.strip().isalpha():
            tokens += (token[i : i + WORD_PART] for i in range(0, len(token), WORD_PART))
        else:
            tokens.append(token)
    assert "".join(tokens) == text
    return tokens


def chunk_texts(tokens: list[str], chunks: int) -> Iterator[str]:
    """Spread tokens evenly over content chunks: one each, and here and there two."""
    if not chunks <= len(tokens) < 2 * chunks:
        raise ValueError(f"{len(tokens)} tokens do not fill {chunks} chunks with one or two each")
    bounds = [i * len(tokens) // chunks for i in range(chunks + 1)]
    return ("".join(tokens[start:end]) for start, end in itertools.pairwise(bounds))


def nanoseconds(ms: float) -> int:
    """The traces have milliseconds with at most three decimals, so that this is exact."""
    return round(ms * 1_000) * 1_000


def offsets(first_ms: float, gaps_ms: Iterable[float]) -> Iterator[int]:
    """Nanoseconds from the request to the first arrival and to the one after each gap, endless if the gaps are."""
    return itertools.accumulate(map(nanoseconds, gaps_ms), initial=nanoseconds(first_ms))


def gpt4o_reads(stream: dict[str, Any]) -> Reads:
    """One read per TLS record after the HTTP head, those with the same capture timestamp in one.

    How events were split over records was not recorded: a record completes as many content chunks as its share of
    the bytes says. One that completes none brings no pieces and is left out, except the last, which ends the answer.
    """
    at_ns = list(offsets(stream["ttfb_ms"], stream["gaps_ms"]))[1:]
    cumulated = list(itertools.accumulate(stream["record_bytes"][1:]))
    reads: dict[int, int] = {}
    before = 0
    for at, so_far in zip(at_ns, cumulated, strict=True):
        completed = round(stream["content_chunks"] * so_far / cumulated[-1])
        reads[at] = reads.get(at, 0) + completed - before
        before = completed
    return [(at, chunks) for at, chunks in reads.items() if chunks or at == at_ns[-1]]


def ollama_reads(stream: dict[str, Any]) -> Reads:
    """One chunk per line; the last line is Ollama's ``done`` line, which brings no text."""
    *lines, done = offsets(stream["ttft_ms"], stream["gaps_ms"])
    return [*((at, 1) for at in lines), (done, 0)]


def demo_reads(first_ms: float, streams: list[dict[str, Any]]) -> Reads:
    """All gaps of all streams in their order, over and over, the very last one cut to end at ``DEMO_NS``."""
    gaps = itertools.cycle(gap for stream in streams for gap in stream["gaps_ms"])
    before_end = itertools.takewhile(lambda at: at < DEMO_NS, offsets(first_ms, gaps))
    return [*((at, 1) for at in before_end), (DEMO_NS, 1)]


def text_of(name: str) -> str:
    """The text that the recording says."""
    return (TEXTS / f"{name}.md").read_text("utf-8").rstrip("\n")


def compose(header: RecordingHeader, reads: Reads) -> Recording:
    """Put the header's own text onto the reads; finish and usage come with the last one."""
    chunks = sum(count for _, count in reads)
    texts = chunk_texts(tokenize(text_of(header.name)), chunks)
    pieces: list[list[Piece]] = [[TextPiece(text) for text in itertools.islice(texts, count)] for _, count in reads]
    usage = UsagePiece(input_tokens=len(tokenize(header.prompt)), output_tokens=chunks)
    pieces[-1] += [FinishPiece("stop"), usage]
    return Recording(header, tuple(RecordedRead(at, tuple(some)) for (at, _), some in zip(reads, pieces, strict=True)))


def compose_calls(header: RecordingHeader, reads: Reads) -> Recording:
    """A step that says a little and calls tools: one piece a read, at the reads' own times."""
    pieces: list[Piece] = [TextPiece(token) for token in tokenize(text_of(header.name))]
    for index, (call_id, name, fragments) in enumerate(TOOLS_CALLS):
        pieces.append(ToolCallPiece(index, call_id, name))
        pieces += (ToolCallPiece(index, arguments_fragment=fragment) for fragment in fragments)
    usage = UsagePiece(input_tokens=len(tokenize(header.prompt)), output_tokens=len(pieces))
    lines = [(piece,) for piece in pieces[:-1]] + [(pieces[-1], FinishPiece("tool_calls"), usage)]
    return Recording(header, tuple(RecordedRead(at, line) for (at, _), line in zip(reads, lines, strict=False)))


def header_for(
    spec: Spec, source: dict[str, Any], *, provider: str, model: str, part: str, note: str
) -> RecordingHeader:
    """The header of one recording; ``part`` names the stream in its source."""
    return RecordingHeader(
        format=FORMAT,
        name=spec.name,
        title=spec.title,
        provider=provider,
        model=model,
        recorded=datetime.date.fromisoformat(source["recorded"][:10]),
        source=f"https://github.com/{source['repo']} @ {source['commit']}: {source['path']}{part}",
        licence=f"{source['licence']} for the times, that of this project for the text; see ATTRIBUTION.md",
        prompt=spec.prompt,
        note=note,
    )


OURS = "Prompt and text are ours; input_tokens counts the prompt in pieces like the text's."
GPT4O_NOTE = (
    "Times of TLS records, as recorded; records with the same timestamp are one read. How content chunks were split "
    "over records was not recorded: they are spread by bytes, and a record that completes none is left out. " + OURS
)
TOOLS_NOTE = (
    "Composed: the times are those of a recorded answer without tools, the calls and the texts are ours. The second "
    "step is what replays once the tools have answered, whatever they said."
)
OLLAMA_NOTE = "Times of the tokens by the server's clock, as recorded; the last is its done line. " + OURS
DEMO_NOTE = (
    "Composed: the first token at the TTFT of the named stream, then the gaps of all four recorded streams in their "
    "order, over and over; nothing is scaled, and the very last gap is cut so that the last token comes at exactly "
    "93 s. " + OURS
)


def gpt4o_recordings(trace: dict[str, Any]) -> Iterator[Recording]:
    """The GPT-4o streams that ``GPT4O_SPECS`` names."""
    for stream in trace["streams"]:
        if spec := GPT4O_SPECS.get(stream["id"]):
            part = f", stream {stream['id']}"
            header = header_for(spec, trace["source"], provider="openai", model="gpt-4o", part=part, note=GPT4O_NOTE)
            yield compose(header, gpt4o_reads(stream))


def tool_recordings(trace: dict[str, Any]) -> Iterator[Recording]:
    """The two steps of an agent that calls tools, at the pace of one recorded stream."""
    stream = next(stream for stream in trace["streams"] if stream["id"] == TOOLS_STREAM)
    for spec, put_together in zip(TOOLS_SPECS, (compose_calls, compose), strict=True):
        part = f", stream {stream['id']}"
        header = header_for(spec, trace["source"], provider="openai", model="gpt-4o", part=part, note=TOOLS_NOTE)
        yield put_together(header, gpt4o_reads(stream))


def ollama_recordings(trace: dict[str, Any]) -> Iterator[Recording]:
    """One Ollama stream as it was, and the long demo that is composed of all of them."""
    source, streams = trace["source"], trace["streams"]
    stream = next(stream for stream in streams if stream["cassette"] == OLLAMA_CASSETTE)
    for spec, note, reads in (
        (OLLAMA_SPEC, OLLAMA_NOTE, ollama_reads(stream)),
        (DEMO_SPEC, DEMO_NOTE, demo_reads(stream["ttft_ms"], streams)),
    ):
        header = header_for(spec, source, provider="ollama", model="llama3", part=OLLAMA_CASSETTE, note=note)
        yield compose(header, reads)


def main(traces: pathlib.Path, out: pathlib.Path = RECORDINGS) -> None:
    """Write all recordings and say what they are like."""
    gpt4o = json.loads((traces / "openai_gpt4o_tls_records.json").read_bytes())
    ollama = json.loads((traces / "ollama_llama3_token_arrivals.json").read_bytes())
    for recording in itertools.chain(gpt4o_recordings(gpt4o), tool_recordings(gpt4o), ollama_recordings(ollama)):
        path = out / f"{recording.header.name}.jsonl"
        dump(recording, path)
        chunks = sum(isinstance(piece, TextPiece) for read in recording.reads for piece in read.pieces)
        print(f"{path}: {recording.duration_ns / 1e9:.6f} s, {len(recording.reads)} reads, {chunks} chunks")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]))
