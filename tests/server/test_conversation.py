"""``lumos chat``: one message or many, with an agent in this process or on a running server."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from quart import Response, request
from quart_trio import QuartTrio

from engine import BasicAgent, ReasoningPiece, TextPiece
from providers.recording import RecordedRead, Recording, load
from providers.replay import ReplayProvider
from tests.harness.background import served, served_agents
from tests.harness.pseudo_terminal import CTRL_C, CTRL_D, in_terminal
from tests.harness.recordings import steady_recording
from tests.harness.vendor import VendorServer, text_event
from tests.server.commands import LUMOS, agent_at, complaint, lumos, write_agents

FIGURES = re.compile(r"TTFB (\d\.\d{3}) s · (~?)(\d+) tokens( · \d+\.\d tokens/s)? · (\d+\.\d\d) s\n")

QUICK = steady_recording(first=0.05, gap=0.05, last=0.2)
LONG = steady_recording(first=0.2, gap=0.05, last=60.0)


class ModelServer:
    """A model server on a real socket, and an agents file with an agent ``local`` that asks it."""

    def __init__(self, vendor: VendorServer, agents: Path) -> None:
        self.vendor = vendor
        self.options = ("--agents", str(agents), "--agent", "local")

    def asked(self, call: int) -> list[tuple[str, str]]:
        """The conversation as the model got it, roles and contents."""
        return [(message["role"], message["content"]) for message in self.vendor.calls[call].body["messages"]]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[ModelServer]:
    vendor = VendorServer(QUICK)
    with served(lambda _: vendor.app()) as url:
        yield ModelServer(vendor, write_agents(tmp_path, agent_at(url)))


class TestOneMessage:
    def test_the_answer_is_all_of_stdout_and_the_figures_are_on_stderr(self, model: ModelServer) -> None:
        result = lumos("chat", "Hello", *model.options)
        assert result.exit_code == 0
        assert result.stdout == QUICK.text + "\n"
        assert FIGURES.fullmatch(result.stderr)
        assert model.asked(0) == [("system", "Be brief."), ("user", "Hello")]

    def test_the_figures_are_those_of_the_recording(self, tmp_path: Path) -> None:
        short = load("gpt4o-short")
        llm_config = '{ provider = "replay", model = "gpt4o-short" }'
        agents = write_agents(tmp_path, f'[[agent]]\nid = "short"\nllm_config = {llm_config}')
        result = lumos("chat", "Why?", "--agents", agents, "--agent", "short")
        assert result.stdout == short.text + "\n"
        figures = FIGURES.fullmatch(result.stderr)
        assert figures is not None
        ttfb, estimated, tokens, rate, elapsed = figures.groups()
        assert short.reads[0].at_ns / 1e9 <= float(ttfb) < short.reads[0].at_ns / 1e9 + 0.3
        assert short.duration_ns / 1e9 - 0.01 <= float(elapsed) < short.duration_ns / 1e9 + 0.5
        assert (estimated, tokens) == ("", "64")
        assert rate

    def test_a_reader_that_leaves_ends_it_quietly(self, model: ModelServer) -> None:
        model.vendor.recording = LONG
        command = [str(LUMOS), "chat", "Hello", *model.options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chat:
            assert chat.stdout is not None
            assert chat.stderr is not None
            assert chat.stdout.read(6) == b"word0 "
            chat.stdout.close()
            assert chat.wait(20) == 1
            assert b"Traceback" not in chat.stderr.read()

    def test_the_options_are_variables_too(self, model: ModelServer) -> None:
        _, agents, _, agent = model.options
        assert lumos("chat", "Hello", env={"LUMOS_AGENTS": agents, "LUMOS_AGENT": agent}).stdout == QUICK.text + "\n"

    @pytest.mark.parametrize("message", ["", " \n"])
    def test_a_blank_message_is_refused(self, message: str) -> None:
        assert complaint(lumos("chat", message)) == "the message is blank"

    def test_an_unknown_agent_is_told_those_there_are(self, model: ModelServer) -> None:
        line = complaint(lumos("chat", "Hello", "--agent", "nobody", *model.options[:2]))
        assert line == "there is no agent 'nobody'; there are: demo, demo-93s, demo-tools, local"

    def test_a_missing_key_names_its_variable(self, tmp_path: Path) -> None:
        agents = write_agents(tmp_path, '[[agent]]\nid = "gpt"\nllm_config = { provider = "openai" }')
        line = complaint(lumos("chat", "Hello", "--agents", agents, "--agent", "gpt", env={"OPENAI_API_KEY": None}))
        assert "OPENAI_API_KEY" in line

    def test_a_broken_agents_file_is_named(self, tmp_path: Path) -> None:
        agents = write_agents(tmp_path, "agent = 1")
        assert complaint(lumos("chat", "Hello", "--agents", agents)).startswith(f"{agents}: ")

    @pytest.mark.parametrize(("variable", "value"), [("https_proxy", "socks5://x"), ("SSL_CERT_FILE", "/no/such")])
    def test_a_network_that_is_set_up_wrong(self, variable: str, value: str) -> None:
        assert variable in complaint(lumos("chat", "Hello", env={variable: value}))

    def test_a_model_server_that_is_not_there_is_an_error_event(self, tmp_path: Path) -> None:
        agents = write_agents(tmp_path, agent_at("http://127.0.0.1:1"))
        result = lumos("chat", "Hello", "--agents", agents, "--agent", "local")
        assert result.exit_code == 1
        assert result.stdout == ""
        error, figures = result.stderr.splitlines()
        assert error.startswith("error upstream.connection: no connection to the model (Connection refused)")
        assert "127.0.0.1" not in error
        assert re.fullmatch(r"no token · \d+\.\d\d s", figures)

    def test_what_was_said_before_a_failure_stays(self, tmp_path: Path) -> None:
        app = QuartTrio("vendor", static_folder=None)

        @app.post("/v1/chat/completions")
        async def break_off() -> Response:
            return Response(text_event("Half an ans"), content_type="text/event-stream")

        with served(lambda _: app) as url:
            agents = write_agents(tmp_path, agent_at(url))
            result = lumos("chat", "Hello", "--agents", agents, "--agent", "local")
        assert result.exit_code == 1
        assert result.stdout == "Half an ans\n"
        assert result.stderr.startswith("error upstream.truncated: ")

    def test_thoughts_go_to_stderr(self, tmp_path: Path) -> None:
        first, *rest = QUICK.reads
        thinking = Recording(QUICK.header, (RecordedRead(first.at_ns, (ReasoningPiece("Hm."),)), *rest))
        with served_agents({"a": replaying(thinking)}) as url:
            result = lumos("chat", "Hello", "--url", url, "--agent", "a")
        assert result.stdout == thinking.text + "\n"
        thought, figures = result.stderr.split("\n\n")
        assert thought == "Hm."
        assert FIGURES.fullmatch(figures)

    def test_a_pipe_gets_the_text_as_it_is(self) -> None:
        coloured = "\x1b[31mred\x1b[0m\r\n"
        first, *rest = QUICK.reads
        recording = Recording(QUICK.header, (RecordedRead(first.at_ns, (TextPiece(coloured),)), *rest))
        with served_agents({"a": replaying(recording)}) as url:
            assert lumos("chat", "Hello", "--url", url, "--agent", "a").stdout_bytes.startswith(coloured.encode())


def replaying(recording: Recording) -> BasicAgent:
    return BasicAgent(agent_id="a", provider=ReplayProvider(recording), model="")


class TestManyMessages:
    def test_each_message_is_asked_with_all_that_was_said_before(self, model: ModelServer) -> None:
        result = lumos("chat", *model.options, typed="first\n\n  \nsecond\n")
        assert result.exit_code == 0
        assert result.stdout == 2 * (QUICK.text + "\n")
        assert len(FIGURES.findall(result.stderr)) == 2
        beginning = [("system", "Be brief."), ("user", "first")]
        assert model.asked(0) == beginning
        assert model.asked(1) == [*beginning, ("assistant", QUICK.text), ("user", "second")]

    def test_a_wrong_agent_is_told_before_anything_is_typed(self) -> None:
        assert complaint(lumos("chat", "--agent", "nobody", typed="")).startswith("there is no agent")

    def test_no_message_at_all_is_no_failure(self) -> None:
        result = lumos("chat", typed="")
        assert (result.exit_code, result.output) == (0, "")

    def test_a_failed_answer_is_not_the_end_but_the_last_one_counts(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = lumos("chat", "--url", nobody, typed="first\nsecond\n")
        assert result.exit_code == 1
        assert result.stderr.count(f"lumos: cannot reach {nobody}: ") == 2

    def test_a_question_without_any_answer_is_forgotten(self, tmp_path: Path) -> None:
        vendor = VendorServer(QUICK)
        app = vendor.app()

        @app.before_request
        async def refuse_the_first() -> Response | None:
            return None if vendor.calls or not refusals else refusals.pop()

        refusals = [Response(b"", 401)]
        with served(lambda _: app) as url:
            agents = write_agents(tmp_path, agent_at(url))
            result = lumos("chat", "--agents", agents, "--agent", "local", typed="first\nsecond\n")
        assert result.exit_code == 0
        assert "error upstream.auth" in result.stderr
        assert [message["content"] for message in vendor.calls[0].body["messages"]] == ["Be brief.", "second"]


class TestTalkToAServer:
    def test_the_answer_and_the_figures_are_the_same_as_without(self) -> None:
        with served_agents({"a": replaying(QUICK)}) as url:
            result = lumos("chat", "Hello", "--agent", "a", env={"LUMOS_URL": url})
        assert (result.exit_code, result.stdout) == (0, QUICK.text + "\n")
        assert FIGURES.fullmatch(result.stderr)

    @pytest.mark.parametrize("as_variable", [True, False])
    def test_a_key_goes_along_and_is_never_shown(self, as_variable: bool) -> None:
        app = QuartTrio("keyed")
        shown: list[str | None] = []

        @app.post("/<path:path>")
        async def refuse(path: str) -> tuple[dict[str, str], int]:
            shown.append(request.headers.get("Authorization"))
            return {"message": "no"}, 401

        with served(lambda _: app) as url:
            options, env = ((), {"LUMOS_API_KEY": "lumos_k_s"}) if as_variable else (("--api-key", "lumos_k_s"), {})
            assert complaint(lumos("chat", "Hello", "--url", url, *options, env=env)) == "HTTP 401: no"
            line = complaint(lumos("chat", "Hello", "--url", url, env={"LUMOS_API_KEY": None}))
        assert line == "HTTP 401: no (lumos chat takes the key from LUMOS_API_KEY, or from --api-key)"
        assert shown == ["Bearer lumos_k_s", None]
        assert "lumos_k_s" not in lumos("chat", "--help", env={"LUMOS_API_KEY": "lumos_k_s"}).output

    def test_an_agent_that_it_does_not_have(self) -> None:
        with served_agents({}) as url:
            line = complaint(lumos("chat", "Hello", "--agent", "nobody", "--url", url))
        assert line == "HTTP 404: there is no agent 'nobody'"

    def test_a_server_that_is_no_lumos(self) -> None:
        app = QuartTrio("other", static_folder=None)

        @app.post("/<path:_>")
        async def say_hello(_: str) -> str:
            return "<html>"

        with served(lambda _: app) as url:
            line = complaint(lumos("chat", "Hello", "--url", url))
        assert line == "the server answered with text/html; charset=utf-8, not with a stream: is it Lumos?"

    @pytest.mark.parametrize("url", ["localhost:8080", "ftp://localhost", "nonsense"])
    def test_a_url_that_is_none(self, url: str) -> None:
        assert complaint(lumos("chat", "Hello", "--url", url)) == f"{url} is not an http or https URL"

    def test_a_server_that_is_not_there(self) -> None:
        line = complaint(lumos("chat", "Hello", "--url", "http://127.0.0.1:1"))
        assert line.startswith("cannot reach http://127.0.0.1:1: ")


class TestAtATerminal:
    """Real Ctrl-C and Ctrl-D, typed into a terminal of the command's own."""

    def test_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_chat(self, model: ModelServer) -> None:
        model.vendor.recording = LONG
        with in_terminal([str(LUMOS), "chat", *model.options]) as keyboard:
            keyboard.see("you> ")
            keyboard.type("first\n")
            keyboard.see("word0 ")
            keyboard.type(CTRL_C)
            keyboard.see("stopped")
            keyboard.see("you> ")
            model.vendor.recording = QUICK
            keyboard.type("second\n")
            keyboard.see("end.\n")
            keyboard.see("you> ")
            keyboard.type(CTRL_D)
            assert keyboard.wait_end() == 0
            assert "Traceback" not in keyboard.shown
        stopped = model.vendor.calls[0]
        assert stopped.ended_at is not None
        assert not stopped.finished
        assert stopped.ended_at - stopped.started_at < 5
        role, partial = model.asked(1)[2]
        assert role == "assistant"
        assert LONG.text.startswith(partial)

    def test_ctrl_c_at_the_prompt_ends_the_chat(self, model: ModelServer) -> None:
        with in_terminal([str(LUMOS), "chat", *model.options]) as keyboard:
            keyboard.see("Ctrl-C stops an answer, Ctrl-D ends the chat.")
            keyboard.see("you> ")
            keyboard.type("half a messa")
            keyboard.see("half a messa")
            keyboard.press_until_end(CTRL_C)
            assert keyboard.wait_end() == 0
            assert "Traceback" not in keyboard.shown
        assert model.vendor.calls == []

    def test_ctrl_c_ends_a_single_answer_with_exit_code_1(self, model: ModelServer) -> None:
        model.vendor.recording = LONG
        with in_terminal([str(LUMOS), "chat", "Hello", *model.options]) as keyboard:
            keyboard.see("word0 ")
            keyboard.type(CTRL_C)
            keyboard.see("stopped")
            assert keyboard.wait_end() == 1
            assert "Traceback" not in keyboard.shown

    def test_ctrl_c_stops_the_run_on_a_server(self) -> None:
        with served_agents({"a": replaying(LONG)}) as url:
            with in_terminal([str(LUMOS), "chat", "Hello", "--agent", "a", "--url", url]) as keyboard:
                keyboard.see("word0 ")
                assert active_runs(url) == 1
                keyboard.type(CTRL_C)
                assert keyboard.wait_end() == 1
            assert active_runs(url) == 0

    def test_ctrl_c_while_the_server_says_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with in_terminal([str(LUMOS), "chat", "Hello", "--url", url]) as keyboard:
                connection, _ = silent.accept()
                with connection:
                    keyboard.type(CTRL_C)
                    keyboard.see("stopped")
                    assert keyboard.wait_end() == 1
            assert "Traceback" not in keyboard.shown

    def test_a_model_cannot_drive_the_terminal(self) -> None:
        first, *rest = QUICK.reads
        nasty = TextPiece("\x1b]0;owned\x07\x1b[2Jstill here\r\n")
        recording = Recording(QUICK.header, (RecordedRead(first.at_ns, (nasty,)), *rest))
        with (
            served_agents({"a": replaying(recording)}) as url,
            in_terminal([str(LUMOS), "chat", "Hello", "--agent", "a", "--url", url]) as keyboard,
        ):
            assert keyboard.wait_end() == 0
            assert keyboard.shown.startswith("]0;owned[2Jstill here\n")


def active_runs(url: str) -> int:
    count: int = httpx.get(f"{url}/health/ready", trust_env=False).json()["active_runs"]
    return count
