"""The recording format: what is refused and why, the round trip, and the packaged recordings' own figures."""

from __future__ import annotations

import datetime
import importlib.resources
import itertools
import json
import pathlib
import statistics
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pieces import FinishPiece, Piece, ReasoningPiece, RequestSentPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.recording import (
    FORMAT,
    RecordedFailure,
    RecordedRead,
    Recording,
    RecordingError,
    RecordingHeader,
    dump,
    dumps,
    load,
    loads,
    names,
)

TEXTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "recording_texts"

NAMES = (
    "demo-93s",
    "demo-tools",
    "demo-tools-step-2",
    "gpt4o-13s",
    "gpt4o-demo",
    "gpt4o-short",
    "ollama-llama3",
)

HEADER: dict[str, Any] = {
    "format": "lumos-recording/1",
    "name": "greeting",
    "title": "A greeting",
    "provider": "somebody",
    "model": "small",
    "recorded": "2026-11-22",
    "source": "made up",
    "licence": "MIT",
    "prompt": "Hello?",
}
HELLO: dict[str, Any] = {"at_ns": 10, "pieces": [{"type": "text", "text": "Hello."}]}
END: dict[str, Any] = {"at_ns": 20, "pieces": [{"type": "finish", "reason": "stop"}]}


def lines(*objects: dict[str, Any] | bytes) -> bytes:
    """JSON Lines of ``objects``; bytes go in as they are."""
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in objects)


def header(failure: RecordedFailure | None = None) -> RecordingHeader:
    """A header like `HEADER`."""
    return RecordingHeader(**{**HEADER, "recorded": datetime.date(2026, 11, 22)}, failure=failure)


def test_recording_is_read() -> None:
    recording = loads(lines(HEADER, HELLO, END))
    assert recording.header == header()
    assert recording.reads == (RecordedRead(10, (TextPiece("Hello."),)), RecordedRead(20, (FinishPiece("stop"),)))
    assert (recording.text, recording.duration_ns) == ("Hello.", 20)


def test_all_kinds_of_pieces_survive_the_round_trip() -> None:
    pieces: tuple[Piece, ...] = (
        ReasoningPiece("hm\n"),
        ToolCallPiece(0, "call_1", "add", '{"a":'),
        ToolCallPiece(0, arguments_fragment="1}"),
        TextPiece("字 \u2028 👩‍👩‍👧"),
        UsagePiece(1, 2),
        FinishPiece("tool_calls"),
    )
    recording = Recording(header(), (RecordedRead(0, pieces), RecordedRead(0, (UsagePiece(1, 2, 3, 4),))))
    assert loads(dumps(recording)) == recording


def test_failure_survives_the_round_trip() -> None:
    failed = Recording(
        header(RecordedFailure(15, "upstream.server", "on fire")), (RecordedRead(10, (TextPiece("He"),)),)
    )
    assert loads(dumps(failed)) == failed


def test_dump_and_load_by_path(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "greeting.jsonl"
    recording = loads(lines(HEADER, HELLO, END))
    dump(recording, path)
    assert load(path) == load(str(path)) == recording


@given(
    gaps=st.lists(st.integers(0, 10**12), max_size=20),
    text=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=21, max_size=21),
)
def test_any_times_and_text_survive_the_round_trip(gaps: list[int], text: list[str]) -> None:
    *offsets, end = itertools.accumulate(gaps, initial=0)
    reads = [RecordedRead(at, (TextPiece(some),)) for at, some in zip(offsets, text, strict=False)]
    recording = Recording(header(), (*reads, RecordedRead(end, (FinishPiece("length"),))))
    assert loads(dumps(recording)) == recording


BAD_REQUEST_SENT = {"at_ns": 1, "pieces": [{"type": "request_sent"}]}
FAILED = {**HEADER, "failure": {"at_ns": 5, "code": "upstream.server", "message": "x"}}

WRONG: dict[str, tuple[bytes, int | None, str]] = {
    "empty": (b"", 1, "the line is empty"),
    "no JSON": (b"hello\n", 1, "JSON is malformed"),
    "header not first": (lines(HELLO, HEADER, END), 1, "contains unknown field `at_ns`"),
    "other format": (lines({**HEADER, "format": "lumos-recording/2"}, END), 1, r"Invalid enum value .*format"),
    "no format": (lines({k: v for k, v in HEADER.items() if k != "format"}, END), 1, "missing required field `format`"),
    "no licence": (lines({k: v for k, v in HEADER.items() if k != "licence"}, END), 1, "required field `licence`"),
    "unknown header field": (lines({**HEADER, "author": "me"}, END), 1, "unknown field `author`"),
    "name is a path": (lines({**HEADER, "name": "../secret"}, END), 1, "the name '../secret' is not"),
    "no date": (lines({**HEADER, "recorded": "yesterday"}, END), 1, r"date.*recorded"),
    "blank line": (lines(HEADER, b"", END), 2, "the line is empty"),
    "cut line": (lines(HEADER, HELLO, b'{"at_ns":20,"pieces":[{"type":"fin'), 3, "Input data was truncated"),
    "two on a line": (lines(HEADER, json.dumps(HELLO).encode() + b" {}", END), 2, "trailing characters"),
    "no object": (lines(HEADER, b"[]", END), 2, "Expected `object`"),
    "float offset": (lines(HEADER, {**HELLO, "at_ns": 10.0}, END), 2, "Expected `int`, got `float`"),
    "string offset": (lines(HEADER, {**HELLO, "at_ns": "10"}, END), 2, "Expected `int`, got `str`"),
    "no offset": (lines(HEADER, {"pieces": []}, END), 2, "required field `at_ns`"),
    "unknown read field": (lines(HEADER, {**HELLO, "at": 1}, END), 2, "unknown field `at`"),
    "unknown type": (lines(HEADER, {"at_ns": 1, "pieces": [{"type": "song"}]}, END), 2, "Invalid value 'song'"),
    "unknown piece field": (
        lines(HEADER, {"at_ns": 1, "pieces": [{"type": "tool_call", "index": 0, "argument_fragment": "{"}]}, END),
        2,
        "a tool_call piece has no field 'argument_fragment'",
    ),
    "unknown reason": (lines(HEADER, {"at_ns": 1, "pieces": [{"type": "finish", "reason": "tired"}]}), 2, "'tired'"),
    "invalid UTF-8": (lines(HEADER, b'{"at_ns":1,"pieces":[{"type":"text","text":"\xff"}]}', END), 2, "0xff"),
    "half a surrogate": (
        lines(HEADER, b'{"at_ns":1,"pieces":[{"type":"text","text":"\\ud800"}]}', END),
        2,
        "Input data was truncated",
    ),
    "before the request": (lines(HEADER, {**HELLO, "at_ns": -1}, END), 2, "at_ns goes back from 0 to -1"),
    "goes back": (lines(HEADER, HELLO, {**END, "at_ns": 9}), 3, "at_ns goes back from 10 to 9"),
    "no pieces": (lines(HEADER, HELLO, {"at_ns": 11, "pieces": []}, END), 3, "a read without pieces"),
    "request sent": (lines(HEADER, HELLO, BAD_REQUEST_SENT | {"at_ns": 11}, END), 3, "a request_sent piece"),
    "no end": (lines(HEADER, HELLO), None, "there is no finish piece, and the header tells of no failure"),
    "no reads": (lines(HEADER), None, "there is no finish piece"),
    "two ends": (lines(HEADER, HELLO, END, END), 4, "only a usage piece may follow"),
    "text after the end": (lines(HEADER, END, {**HELLO, "at_ns": 20}), 3, "only a usage piece may follow"),
    "early failure": (lines(FAILED, HELLO), 1, "the failure at 5 comes before the last read at 10"),
    "unknown code": (
        lines({**HEADER, "failure": {"at_ns": 5, "code": "timeout.total", "message": "x"}}),
        1,
        "Invalid enum value 'timeout.total'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recording_is_refused(case: str) -> None:
    data, line, reason = WRONG[case]
    with pytest.raises(RecordingError, match=reason) as caught:
        loads(data)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"line {line}: " if line else caught.value.reason)


def test_error_names_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(HEADER, HELLO, b"", END))
    with pytest.raises(RecordingError) as caught:
        load(path)
    assert str(caught.value) == f"{path}, line 3: the line is empty"
    assert (caught.value.origin, caught.value.line, caught.value.reason) == (str(path), 3, "the line is empty")


def test_recording_made_in_memory_is_checked_too() -> None:
    with pytest.raises(RecordingError, match="goes back"):
        Recording(header(), (RecordedRead(5, (TextPiece("a"),)), RecordedRead(4, (FinishPiece("stop"),))))
    with pytest.raises(RecordingError, match="request_sent"):
        Recording(header(), (RecordedRead(0, (RequestSentPiece(),)),))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecordingError) as caught:
        load("gpt5-demo")
    assert str(caught.value) == ("no recording is named 'gpt5-demo'; there are: " + ", ".join(NAMES))


def test_packaged_file_must_bear_its_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "farewell.jsonl").write_bytes(lines(HEADER, HELLO, END))
    monkeypatch.setattr("providers.recording._PACKAGED", tmp_path)
    with pytest.raises(RecordingError, match=r"^farewell\.jsonl, line 1: the header's name is 'greeting'$"):
        load("farewell")


def test_missing_file_is_an_os_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.jsonl")


def test_packaged_names() -> None:
    assert names() == NAMES


def test_packaged_recording_is_read_once() -> None:
    assert load("gpt4o-short") is load("gpt4o-short")


@pytest.mark.parametrize("name", NAMES)
def test_packaged_recording_is_sound(name: str) -> None:
    recording = load(name)
    assert (recording.header.format, recording.header.name, recording.header.failure) == (FORMAT, name, None)
    assert recording.header.source.startswith("https://github.com/")
    offsets = [read.at_ns for read in recording.reads]
    assert all(before < after for before, after in itertools.pairwise(offsets)), "reads of one instant are one read"
    pieces = [piece for read in recording.reads for piece in read.pieces]
    assert sum(isinstance(piece, FinishPiece) for piece in pieces) == 1
    *_, finish, usage = recording.reads[-1].pieces
    chunks = sum(isinstance(piece, TextPiece | ToolCallPiece) for piece in pieces)
    assert finish == FinishPiece("tool_calls" if name == "demo-tools" else "stop")
    assert isinstance(usage, UsagePiece)
    assert usage.output_tokens == chunks
    assert 0 < usage.input_tokens < 25
    assert all(piece.text for piece in pieces if isinstance(piece, TextPiece))


@pytest.mark.parametrize("name", NAMES)
def test_packaged_text_is_whole(name: str) -> None:
    text = load(name).text
    assert text == (TEXTS / f"{name}.md").read_text("utf-8").rstrip("\n")
    assert text.endswith(".")


def test_packaged_recordings_stay_small() -> None:
    assert sum(len(dumps(load(name))) for name in NAMES) < 300_000


def chunk_offsets(name: str) -> list[int]:
    """The offset in nanoseconds of each content chunk."""
    return [read.at_ns for read in load(name).reads for piece in read.pieces if isinstance(piece, TextPiece)]


@pytest.mark.parametrize(
    ("name", "reads", "chunks", "first_ns", "last_content_ns", "end_ns"),
    [
        # ttfb_ms + gaps_ms[0] of the stream; then the sums of all gaps, as in the source.
        ("gpt4o-demo", 170, 390, 463_893_000, 4_363_082_000, 4_363_082_000),
        ("gpt4o-13s", 209, 479, 415_274_000, 13_150_964_000, 13_150_965_000),
        ("gpt4o-short", 36, 64, 389_035_000, 1_045_751_000, 1_048_390_000),
        # ttft_ms; total_ms less the last gap; total_ms.
        ("ollama-llama3", 50, 49, 319_355_000, 1_865_308_000, 1_897_386_000),
        ("demo-93s", 2873, 2873, 319_355_000, 93_000_000_000, 93_000_000_000),
    ],
)
def test_figures_are_those_of_the_source(
    name: str, reads: int, chunks: int, first_ns: int, last_content_ns: int, end_ns: int
) -> None:
    recording, offsets = load(name), chunk_offsets(name)
    assert (len(recording.reads), len(offsets)) == (reads, chunks)
    assert (offsets[0], offsets[-1], recording.duration_ns) == (first_ns, last_content_ns, end_ns)


def test_gpt4o_comes_in_bursts() -> None:
    """The trace's longest gap is 159.817 ms; a record without a whole chunk, 1 µs before its end, is left out."""
    recording = load("gpt4o-demo")
    gaps = [after.at_ns - before.at_ns for before, after in itertools.pairwise(recording.reads)]
    assert max(gaps) == 159_818_000
    assert min(gaps) == 1_000
    assert max(len(read.pieces) for read in recording.reads) == 9


def test_ollama_is_a_metronome() -> None:
    gaps = [after - before for before, after in itertools.pairwise(chunk_offsets("ollama-llama3"))]
    assert gaps[:3] == [32_537_000, 32_436_000, 31_663_000]
    assert (min(gaps), max(gaps)) == (31_621_000, 33_770_000)


def test_demo_repeats_the_four_recorded_streams() -> None:
    gaps = [after - before for before, after in itertools.pairwise(chunk_offsets("demo-93s"))]
    assert gaps[:3] == [32_537_000, 32_436_000, 31_663_000]
    cycle = gaps[: 49 + 57 + 62 + 70]
    assert (min(cycle), statistics.median(cycle), max(cycle)) == (31_412_000, 32_046_000, 37_711_000)
    assert gaps[len(cycle) : -1] == gaps[: -len(cycle) - 1]
    assert gaps[-1] == 28_050_000


def test_the_licences_of_others_data_are_packaged_whole() -> None:
    folder = importlib.resources.files("providers") / "recordings"
    attribution = (folder / "ATTRIBUTION.md").read_text("utf-8")
    ends = {
        "LICENSE-APACHE-2.0.txt": "END OF TERMS AND CONDITIONS",
        "LICENSE-MIT.txt": "OTHER DEALINGS IN THE SOFTWARE",
    }
    for file, end in ends.items():
        assert f"`{file}`" in attribution
        assert end in (folder / file).read_text("utf-8")
    project = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert "recordings/*.txt" in project["tool"]["setuptools"]["package-data"]["providers"]
