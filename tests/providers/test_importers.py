"""Other tools' files as recordings: the exact times and pieces of small files of our own making."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from engine.pieces import FinishPiece, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from providers.importers import UNDATED, UnknownImportError, import_recordings
from providers.recording import Recording, dumps, load, loads
from tests.server.commands import complaint, lumos

FIXTURES = Path(__file__).parent / "import_fixtures"
FILES = sorted(FIXTURES.iterdir())


def imported(name: str, seed: int = 0) -> list[Recording]:
    return import_recordings((FIXTURES / name).read_bytes(), name, seed=seed)


def timed(recording: Recording) -> list[tuple[float, Piece]]:
    """Each piece with its milliseconds."""
    return [(read.at_ns / 1e6, piece) for read in recording.reads for piece in read.pieces]


def texts(recording: Recording) -> list[tuple[float, str]]:
    return [(at, piece.text) for at, piece in timed(recording) if isinstance(piece, TextPiece)]


def pieces(recording: Recording) -> Iterable[Piece]:
    return (piece for _, piece in timed(recording))


class TestAimock:
    def test_a_profile(self) -> None:
        recording = imported("aimock.json")[0]
        assert timed(recording) == [
            (400.0, ReasoningPiece("Be kind.")),
            (450.0, TextPiece("Hello th")),
            (500.0, TextPiece("ere, 世界!")),
            (550.0, TextPiece(" 👋")),
            (550.0, UsagePiece(3, 9)),
            (550.0, FinishPiece("stop")),
        ]
        header = recording.header
        assert (header.provider, header.model, header.prompt) == ("aimock", "gpt-4o", "Say hello")
        assert header.source == "aimock.json, fixture 1"

    def test_calls_and_a_flat_latency(self) -> None:
        assert timed(imported("aimock.json")[1]) == [
            (25.0, TextPiece("I look.")),
            (50.0, ToolCallPiece(0, "call_a", "weather")),
            (75.0, ToolCallPiece(0, arguments_fragment='{"city":"Bern"}')),
            (100.0, ToolCallPiece(1, "call_1", "time")),
            (125.0, ToolCallPiece(1, arguments_fragment='{"zone":8}')),
            (125.0, UsagePiece(12, 34)),
            (125.0, FinishPiece("tool_calls")),
        ]

    def test_times_that_were_recorded(self) -> None:
        recording = imported("aimock.json")[2]
        assert texts(recording) == [(150.0, "ab"), (155.0, "cd"), (175.0, "ef")]
        assert FinishPiece("length") in pieces(recording)

    def test_jitter_is_the_seeds(self) -> None:
        one, same, other = (imported("aimock.json", seed)[3] for seed in (1, 1, 2))
        assert one == same
        assert [at for at, _ in timed(one)] != [at for at, _ in timed(other)]
        assert all(50 <= at <= 150 for at, _ in timed(one)[:1])

    def test_blocks_in_their_order(self) -> None:
        kinds = [type(piece) for piece in pieces(imported("aimock.json")[3])]
        assert kinds[:4] == [ToolCallPiece, ToolCallPiece, TextPiece, TextPiece]

    def test_what_does_not_stream_is_left_out(self) -> None:
        assert len(imported("aimock.json")) == 4


class TestVllm:
    def test_each_token_at_its_time(self) -> None:
        recording = imported("vllm.json")[0]
        assert texts(recording) == [(250.0, "One,"), (260.0, " two"), (280.0, ", th"), (310.0, "ree.")]
        assert timed(recording)[-2:] == [(310.0, UsagePiece(5, 4)), (310.0, FinishPiece("stop"))]
        assert recording.header.model == "org/small-model"
        assert recording.header.recorded == datetime.date(2026, 11, 21)

    def test_a_request_that_said_nothing_is_left_out_and_one_that_broke_off_says_so(self) -> None:
        _, second, broken = imported("vllm.json")
        assert second.text == "流👀"
        assert broken.text == "Half an"
        failure = broken.header.failure
        assert failure is not None
        assert (failure.at_ns, failure.message) == (625_000_000, "Connection reset")

    def test_a_file_without_a_date(self) -> None:
        file = json.loads((FIXTURES / "vllm.json").read_bytes()) | {"date": "yesterday"}
        (first, *_) = import_recordings(json.dumps(file).encode(), "x.json")
        assert first.header.recorded == UNDATED


class TestTraces:
    def test_tls_records(self) -> None:
        """Of a stream without a record after the answer's head there is nothing to say."""
        (recording,) = imported("tls_records.json")
        assert [at for at, _ in texts(recording)] == [420.75, 420.75, 450.751]
        assert load("demo-93s").text.startswith(recording.text)
        assert recording.header.provider == "openai"
        assert recording.header.recorded == datetime.date(2026, 3, 30)

    def test_tokens(self) -> None:
        (recording,) = imported("tokens.json")
        assert [at for at, _ in texts(recording)] == [319.355, 351.855, 383.105]
        assert (recording.header.provider, recording.header.model) == ("ollama", "llama3")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_imported_is_a_recording_and_the_same_each_time(file: Path) -> None:
    recordings = import_recordings(file.read_bytes(), file.name)
    assert [loads(dumps(recording)) for recording in recordings] == recordings
    assert import_recordings(file.read_bytes(), file.name) == recordings


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"[]", "Expected `object`"),
        (b"\xff", "malformed"),
        (b"{}", "neither aimock fixtures nor a vLLM benchmark nor a trace"),
        (b'{"fixtures": []}', "no answer that streams"),
        (b'{"fixtures": [{"response": {"content": 7}}]}', "Expected `str"),
        (b'{"ttfts": [], "itls": [], "generated_texts": []}', "missing required field"),
        (b'{"schema": "token-arrivals/1", "streams": {}}', "Expected `array`"),
    ],
)
def test_what_cannot_be_imported_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(UnknownImportError) as caught:
        import_recordings(data, "x.json")
    assert str(caught.value).startswith("x.json: ")
    assert reason in str(caught.value)


def test_times_that_go_back_are_refused() -> None:
    file = json.loads((FIXTURES / "vllm.json").read_bytes())
    file["itls"][0] = [-1.0, 0.0, 0.0]
    with pytest.raises(UnknownImportError, match="at_ns goes back"):
        import_recordings(json.dumps(file).encode(), "x.json")


class TestCommand:
    def test_several_answers_are_several_files(self, tmp_path: Path) -> None:
        result = lumos("record", "--import", FIXTURES / "vllm.json", "--output", tmp_path / "run.jsonl")
        assert result.exit_code == 0, result.stderr
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["run-1.jsonl", "run-2.jsonl", "run-3.jsonl"]
        assert load(tmp_path / "run-2.jsonl").header.name == "run-2"
        assert len(result.stderr.splitlines()) == 3

    def test_one_of_them(self, tmp_path: Path) -> None:
        output = tmp_path / "calls.jsonl"
        result = lumos("record", "--import", FIXTURES / "aimock.json", "--index", "2", "--output", output)
        assert result.exit_code == 0
        assert load(output).header.prompt == "What is the weather?"

    def test_by_variables(self, tmp_path: Path) -> None:
        output = tmp_path / "a.jsonl"
        variables = {"LUMOS_IMPORT": str(FIXTURES / "tokens.json"), "LUMOS_OUTPUT": str(output), "LUMOS_SEED": "3"}
        assert lumos("record", env=variables).exit_code == 0
        assert load(output).header.name == "a"

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        line = complaint(
            lumos("record", "--import", FIXTURES / "tokens.json", "--index", "2", "--output", tmp_path / "a")
        )
        assert line == "tokens.json has no answer 2"

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        line = complaint(lumos("record", "--import", tmp_path / "none.json", "--output", tmp_path / "a"))
        assert line == f"{tmp_path / 'none.json'}: No such file or directory"

    def test_it_does_not_overwrite(self, tmp_path: Path) -> None:
        output = tmp_path / "a.jsonl"
        output.write_text("old")
        line = complaint(lumos("record", "--import", FIXTURES / "tokens.json", "--output", output))
        assert "--force" in line
        assert output.read_text() == "old"

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text("{}")
        line = complaint(lumos("record", "--import", tmp_path / "x.json", "--output", tmp_path / "a"))
        assert line.startswith("x.json: neither")
