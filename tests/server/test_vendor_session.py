"""``lumos replay --serve`` and ``lumos record --provider``: the mock from the command line, recorded from."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from engine.pieces import FinishPiece, TextPiece
from providers.encoders import MOCKED_VENDORS
from providers.recording import dump, load
from providers.registry import key_variable
from providers.vendors import VENDORS
from server.vendor_server import create_vendor_app
from server.vendor_session import hints, mocked_providers
from tests.harness.background import served
from tests.harness.pseudo_terminal import CTRL_C, in_terminal
from tests.harness.recordings import steady_recording
from tests.server.commands import LUMOS, SURROUNDINGS, complaint, lumos

QUICK = steady_recording(first=0.02, gap=0.02, last=0.1)
CHAT = {"model": "m", "stream": True}
KEY = {"Authorization": "Bearer k"}


@contextmanager
def serving(*arguments: str | Path, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command on a free port, and its URL."""
    command = [str(LUMOS), "replay", *map(str, arguments), "--serve", "--port", "0"]
    environment = {**os.environ, **SURROUNDINGS, **(env or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as mock:
        try:
            assert mock.stdout is not None
            yield mock, mock.stdout.readline().strip()
        finally:
            mock.kill()


def ask(url: str, path: str = "/v1/chat/completions", model: str = "m") -> httpx.Response:
    with httpx.Client(trust_env=False) as client:
        return client.post(url + path, json=CHAT | {"model": model}, headers=KEY)


class TestServe:
    def test_it_answers_and_ctrl_c_ends_it_at_once(self, tmp_path: Path) -> None:
        dump(QUICK, tmp_path / "quick.jsonl")
        with serving(tmp_path / "quick.jsonl") as (mock, url):
            assert "word0 " in ask(url).text
            mock.send_signal(signal.SIGINT)
            assert mock.wait(5) == 0
            assert mock.stderr is not None
            assert mock.stderr.read() == ""

    def test_ctrl_c_cuts_what_streams(self) -> None:
        with (
            serving("demo-93s") as (mock, url),
            httpx.Client(trust_env=False) as client,
            client.stream("POST", url + "/v1/chat/completions", json=CHAT, headers=KEY) as response,
        ):
            chunks = response.iter_bytes()
            assert next(chunks)
            mock.send_signal(signal.SIGINT)
            assert mock.wait(5) == 0
            with pytest.raises(httpx.TransportError):
                list(chunks)

    def test_one_provider_alone(self) -> None:
        with serving("gpt4o-short", "--provider", "claude") as (_, url):
            assert ask(url).status_code == 404
            assert ask(url, "/v1/messages").status_code == 200

    def test_providers_by_variable(self) -> None:
        with serving("gpt4o-short", env={"LUMOS_PROVIDER": "cohere ollama"}) as (_, url):
            assert ask(url, "/v2/chat").status_code == 200
            assert ask(url, "/api/chat").status_code == 200
            assert ask(url, "/v1/messages").status_code == 404

    def test_without_a_name_models_name_recordings(self) -> None:
        with serving() as (_, url):
            assert ask(url, model="gpt4o-short").status_code == 200
            assert ask(url, model="another").status_code == 404

    def test_on_a_terminal_it_says_how_to_talk_to_it(self) -> None:
        command = [str(LUMOS), "replay", "gpt4o-short", "--serve", "--port", "0", "--provider", "anthropic"]
        with in_terminal(command) as keyboard:
            keyboard.see("http://127.0.0.1:")
            keyboard.see("curl -N http://127.0.0.1:")
            keyboard.see("Anthropic(base_url=")
            keyboard.see("LUMOS_ANTHROPIC_BASE_URL=http://127.0.0.1:")
            keyboard.type(CTRL_C)
            assert keyboard.wait_end() == 0
            assert "Traceback" not in keyboard.shown

    def test_a_provider_that_is_none(self) -> None:
        assert "there is no mock of 'nobody'" in complaint(lumos("replay", "--serve", "--provider", "nobody"))

    def test_an_address_that_is_taken(self) -> None:
        with serving("gpt4o-short") as (_, url):
            port = url.rpartition(":")[2]
            line = complaint(lumos("replay", "gpt4o-short", "--serve", "--port", port))
        assert line.startswith(f"cannot listen on 127.0.0.1:{port}: ")


class TestHints:
    @pytest.mark.parametrize("provider", MOCKED_VENDORS)
    def test_the_command_is_one_that_works(self, provider: str) -> None:
        with served(lambda _: create_vendor_app(QUICK, [provider])) as url:
            command, *_, variable = hints(provider, url, "m")
            assert variable == f"LUMOS_{provider.upper()}_BASE_URL={url}{MOCKED_VENDORS[provider].base_path}"
            run = ["sh", "-c", f"{command} --no-progress-meter --noproxy '*'"]
            answer = subprocess.run(run, capture_output=True, text=True, timeout=30, check=True)
        assert "word0 " in answer.stdout

    def test_all_are_mocked_unless_some_are_wanted(self) -> None:
        assert mocked_providers(()) == tuple(MOCKED_VENDORS)
        assert mocked_providers(("maas", "gemini")) == ("huawei_maas", "gemini")


class TestRecordFromTheMock:
    @pytest.mark.parametrize("provider", VENDORS)
    def test_every_provider_with_its_bytes(self, provider: str, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        variable = key_variable(VENDORS[provider], {})
        env = {variable: "sk-secret-key"} if variable else {}
        with served(lambda _: create_vendor_app(QUICK, [provider])) as url:
            base_url = url + MOCKED_VENDORS[provider].base_path
            options = ("--provider", provider, "--base-url", base_url, "--prompt", "Hi", "--output", output)
            result = lumos("record", *options, "--model", "m", env=env)
        assert result.exit_code == 0, result.stderr
        recording = load(output)
        assert recording.text == QUICK.text
        assert recording.has_raw
        assert recording.header.provider == provider
        assert recording.header.model == "m"
        assert recording.header.request
        assert any(isinstance(piece, FinishPiece) for read in recording.reads for piece in read.pieces)
        assert b"sk-secret-key" not in output.read_bytes()

    def test_the_providers_own_model_and_url(self, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        with served(lambda _: create_vendor_app(QUICK)) as url:
            env = {"ANTHROPIC_API_KEY": "k", "LUMOS_ANTHROPIC_BASE_URL": url}
            assert lumos("record", "--provider", "claude", "--prompt", "Hi", "--output", output, env=env).exit_code == 0
        header = load(output).header
        assert (header.provider, header.model) == ("anthropic", VENDORS["anthropic"].default_model)
        assert header.source == "lumos record --provider claude"

    def test_what_was_recorded_is_served_byte_for_byte(self, tmp_path: Path) -> None:
        output = tmp_path / "answer.jsonl"
        with served(lambda _: create_vendor_app(QUICK)) as url:
            env = {"OPENAI_API_KEY": "k", "LUMOS_OPENAI_BASE_URL": f"{url}/v1"}
            lumos("record", "--provider", "openai", "--prompt", "Hi", "--output", output, env=env)
        recording = load(output)
        with serving(output, "--provider", "openai") as (_, url):
            answer = ask(url)
        assert answer.content == b"".join(read.raw or b"" for read in recording.reads)
        assert TextPiece("word0 ") in recording.reads[0].pieces

    def test_without_a_key(self, tmp_path: Path) -> None:
        env = {"ANTHROPIC_API_KEY": None, "CLAUDE_API_KEY": None}
        line = complaint(lumos("record", "--provider", "claude", "--prompt", "Hi", "--output", tmp_path / "a", env=env))
        assert "ANTHROPIC_API_KEY" in line

    def test_an_unknown_provider(self, tmp_path: Path) -> None:
        line = complaint(lumos("record", "--provider", "nobody", "--prompt", "Hi", "--output", tmp_path / "a"))
        assert "unknown provider 'nobody'" in line

    def test_it_needs_a_prompt(self, tmp_path: Path) -> None:
        result = lumos("record", "--provider", "openai", "--output", tmp_path / "a")
        assert result.exit_code == 2
        assert "Missing option '--prompt'" in result.stderr
