"""``lumos record`` and ``lumos replay``: from a model server on a real socket to a file, and back to the terminal."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from quart import Response
from quart_trio import QuartTrio

from engine import Deadlines, FinishPiece, TextPiece
from providers.recording import RecordedFailure, RecordedRead, Recording, dump, load, names
from server.recording_session import replay_deadlines
from tests.harness.background import served
from tests.harness.pseudo_terminal import CTRL_C, in_terminal
from tests.harness.recordings import steady_recording
from tests.harness.vendor import VendorServer, text_event
from tests.server.commands import LUMOS, complaint, lumos

QUICK = steady_recording(first=0.1, gap=0.1, last=0.4)
LATE_SECONDS = 0.25
"""How late a shared test machine may be."""


@pytest.fixture
def vendor() -> VendorServer:
    return VendorServer(QUICK)


@pytest.fixture
def api(vendor: VendorServer) -> Iterator[str]:
    with served(lambda _: vendor.app()) as url:
        yield f"{url}/v1"


def record(api: str, output: Path, *more: str, env: dict[str, str | None] | None = None) -> Result:
    options: tuple[str | Path, ...] = (
        "--base-url",
        api,
        "--model",
        "m",
        "--prompt",
        "Say\nit.",
        "--output",
        output,
        *more,
    )
    return lumos("record", *options, env=env)


def only_answer(body: bytes, status: int = 200) -> QuartTrio:
    """A model server that answers everything with this."""
    app = QuartTrio("vendor", static_folder=None)

    @app.post("/v1/chat/completions")
    async def answer() -> Response:
        return Response(body, status, content_type="text/event-stream")

    return app


class TestRecord:
    def test_the_recording_has_the_text_and_the_times_of_the_answer(
        self, api: str, vendor: VendorServer, tmp_path: Path
    ) -> None:
        output = tmp_path / "my Answer.jsonl"
        result = record(api, output)
        assert result.exit_code == 0
        assert result.stdout == QUICK.text + "\n"
        assert re.fullmatch(rf"TTFB .*\n\d+ reads, 0\.\d\d s -> {re.escape(str(output))}\n", result.stderr)
        recording = load(output)
        assert text_times(recording).keys() == text_times(QUICK).keys()
        for text, at in text_times(recording).items():
            assert 0 <= at - text_times(QUICK)[text] < LATE_SECONDS
        (call,) = vendor.calls
        assert call.body["messages"] == [{"role": "user", "content": "Say\nit."}]

    def test_the_header_says_what_it_is(self, api: str, tmp_path: Path) -> None:
        before = datetime.datetime.now(datetime.UTC).date()
        output = tmp_path / "my Answer.jsonl"
        assert record(api, output).exit_code == 0
        header = load(output).header
        assert (header.name, header.title, header.prompt) == ("my-answer", "m: Say it.", "Say\nit.")
        assert (header.provider, header.model) == ("openai_compatible", "m")
        assert header.source == f"lumos record --base-url {api} --model m"
        assert before <= header.recorded <= datetime.datetime.now(datetime.UTC).date()
        assert header.failure is None

    def test_it_replays(self, api: str, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        record(api, output)
        replayed = lumos("replay", output)
        assert replayed.exit_code == 0
        assert replayed.stdout == QUICK.text + "\n"
        figures = re.fullmatch(r"TTFB (\d\.\d+) s · 4 tokens · .* · (\d\.\d+) s\n", replayed.stderr)
        assert figures is not None
        ttfb, elapsed = map(float, figures.groups())
        times = [read.at_ns / 1e9 for read in load(output).reads]
        assert times[0] - 0.001 <= ttfb < times[0] + LATE_SECONDS
        assert times[-1] - 0.006 <= elapsed < times[-1] + LATE_SECONDS

    def test_the_options_are_variables_too(self, api: str, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        output.write_text("old")
        variables = {"BASE_URL": api, "MODEL": "m", "PROMPT": "Say it.", "OUTPUT": str(output), "FORCE": "1"}
        result = lumos("record", env={f"LUMOS_{name}": value for name, value in variables.items()})
        assert result.exit_code == 0
        assert load(output).text == QUICK.text

    def test_an_answer_that_breaks_off_is_recorded_as_incomplete(self, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        with served(lambda _: only_answer(text_event("Half an ans"))) as url:
            result = record(f"{url}/v1", output)
        assert result.exit_code == 1
        assert result.stdout == "Half an ans\n"
        assert "error upstream.truncated: " in result.stderr
        assert ", incomplete -> " in result.stderr
        recording = load(output)
        assert recording.text == "Half an ans"
        assert recording.header.failure is not None
        assert recording.header.failure.code == "upstream.truncated"
        assert "Incomplete: " in recording.header.note

    def test_a_refusal_leaves_no_file(self, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        with served(lambda _: only_answer(b"", 401)) as url:
            result = record(f"{url}/v1", output)
        assert result.exit_code == 1
        assert "error upstream.auth: " in result.stderr
        assert result.stderr.endswith("nothing to record\n")
        assert not output.exists()

    def test_an_upstream_that_is_not_there(self, tmp_path: Path) -> None:
        result = record("http://127.0.0.1:1/v1", tmp_path / "answer.jsonl")
        assert result.exit_code == 1
        assert result.stderr.startswith("error upstream.connection: ")

    def test_a_secret_in_the_url_is_refused_and_not_shown(self, api: str, tmp_path: Path) -> None:
        line = complaint(record(api.replace("http://", "http://me:secret@"), tmp_path / "answer.jsonl"))
        assert "base_url" in line
        assert "secret" not in line

    def test_ctrl_c_keeps_what_was_said(self, api: str, vendor: VendorServer, tmp_path: Path) -> None:
        vendor.recording = steady_recording(first=0.1, gap=0.1, last=60.0)
        output = tmp_path / "answer.jsonl"
        options = ("--base-url", api, "--model", "m", "--prompt", "Hi", "--output", str(output))
        with in_terminal([str(LUMOS), "record", *options]) as keyboard:
            keyboard.see("word1 ")
            keyboard.type(CTRL_C)
            keyboard.see("stopped")
            keyboard.see(", incomplete -> ")
            assert keyboard.wait_end() == 1
            assert "Traceback" not in keyboard.shown
        recording = load(output)
        assert recording.text.startswith("word0 word1 ")
        assert recording.header.failure is not None


class TestRecordAsksNobody:
    """When the answer could not be written, or the key is missing."""

    @pytest.fixture(autouse=True)
    def _nobody_was_asked(self, vendor: VendorServer) -> Iterator[None]:
        yield
        assert vendor.calls == []

    def test_it_does_not_overwrite(self, api: str, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        output.write_text("old")
        assert complaint(record(api, output)) == f"{output}: is there already; --force replaces it"
        assert output.read_text() == "old"

    def test_no_such_directory(self, api: str, tmp_path: Path) -> None:
        output = tmp_path / "no" / "answer.jsonl"
        assert complaint(record(api, output)) == f"{output.parent}: No such file or directory"

    def test_a_directory_that_is_not_to_be_written_to(
        self, api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        assert complaint(record(api, tmp_path / "answer.jsonl")) == f"{tmp_path}: Permission denied"

    def test_a_missing_key_names_its_variable(self, api: str, tmp_path: Path) -> None:
        line = complaint(record(api, tmp_path / "answer.jsonl", "--api-key-env", "SOME_KEY", env={"SOME_KEY": None}))
        assert "SOME_KEY" in line

    def test_a_url_that_is_none(self, tmp_path: Path) -> None:
        assert "base_url" in complaint(record("localhost:8080", tmp_path / "answer.jsonl"))

    @pytest.mark.parametrize("left_out", ["--base-url", "--model", "--prompt", "--output"])
    def test_what_is_required(self, tmp_path: Path, left_out: str) -> None:
        options = {"--base-url": "http://localhost", "--model": "m", "--prompt": "Hi", "--output": str(tmp_path / "a")}
        del options[left_out]
        result = lumos("record", *(word for option in options.items() for word in option))
        assert result.exit_code == 2
        assert f"Missing option '{left_out}'" in result.stderr


def text_times(recording: Recording) -> dict[str, float]:
    """When each text had come; they differ in these recordings."""
    return {
        piece.text: read.at_ns / 1e9
        for read in recording.reads
        for piece in read.pieces
        if isinstance(piece, TextPiece)
    }


class TestReplay:
    def test_the_list_has_every_recording(self) -> None:
        lines = lumos("replay", "--list").stdout.splitlines()
        assert [line.split()[0] for line in lines] == list(names())
        for line, name in zip(lines, names(), strict=True):
            recording = load(name)
            assert f"{recording.duration_ns / 1e9:.2f} s" in line
            assert line.endswith(recording.header.title)

    def test_the_list_by_variable(self) -> None:
        assert lumos("replay", env={"LUMOS_LIST": "1"}).stdout == lumos("replay", "--list").stdout

    def test_a_packaged_recording(self) -> None:
        result = lumos("replay", "gpt4o-short")
        assert (result.exit_code, result.stdout) == (0, load("gpt4o-short").text + "\n")
        assert result.stderr.startswith("TTFB 0.")

    def test_nothing_named(self) -> None:
        result = lumos("replay")
        assert result.exit_code == 2
        assert "name a recording, or use --list" in result.stderr

    def test_an_unknown_name_is_told_those_there_are(self) -> None:
        assert complaint(lumos("replay", "nope")) == f"no recording is named 'nope'; there are: {', '.join(names())}"

    def test_a_file_that_is_not_there(self) -> None:
        assert complaint(lumos("replay", "./nope.jsonl")) == "nope.jsonl: No such file or directory"

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.jsonl"
        path.write_text("{}")
        assert complaint(lumos("replay", path)).startswith(f"{path}, line 1: ")

    def test_a_recorded_failure_fails_again(self, tmp_path: Path) -> None:
        failed = with_failure(RecordedRead(10_000_000, (TextPiece("Half"),)), at=20_000_000)
        dump(failed, tmp_path / "failed.jsonl")
        result = lumos("replay", tmp_path / "failed.jsonl")
        assert (result.exit_code, result.stdout) == (1, "Half\n")
        assert result.stderr.startswith("error upstream.overloaded: too busy\n")


def with_failure(*reads: RecordedRead, at: int) -> Recording:
    failure = RecordedFailure(at, "upstream.overloaded", "too busy")
    header = QUICK.header
    fields = {name: getattr(header, name) for name in header.__struct_fields__} | {"failure": failure}
    return Recording(type(header)(**fields), reads)


def test_no_deadline_is_shorter_than_the_recording() -> None:
    hour = 3600 * 10**9
    slow = Recording(QUICK.header, (RecordedRead(hour, (TextPiece("at last"), FinishPiece("stop"))),))
    late = with_failure(at=hour)
    for recording in (slow, late):
        deadlines = replay_deadlines(recording)
        assert min(deadlines.total, deadlines.first_token, deadlines.idle) > 3600
        assert deadlines.connect == Deadlines().connect
