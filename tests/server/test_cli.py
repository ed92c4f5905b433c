"""The command line as a whole: its options, what they become, what it says when it cannot go on, what it imports."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest

from server import logs
from server.cli import LOG_LEVELS, main
from server.compose import ServerSettings
from tests.server.commands import LUMOS, agent_at, complaint, lumos, write_agents

COMMANDS = sorted(main.commands)
OPTIONS_OF_THE_MOCK = {("replay", "--host"), ("replay", "--port")}
"""It runs beside ``lumos serve``, which has a host and a port of its own."""

NO_AGENTS_FROM_OUTSIDE = {"LUMOS_AGENTS": None, "LUMOS_DATABASE_URL": "sqlite://"}


def options_of(group: click.Group, *path: str) -> Iterator[Any]:
    """Every option of every command: the words that call the command, and the option."""
    for name, command in group.commands.items():
        words = (*path, name)
        for option in command.params:
            if isinstance(option, click.Option):
                yield pytest.param(words, option, id=" ".join([*words, option.opts[0]]))
        if isinstance(command, click.Group):
            yield from options_of(command, *words)


SETTINGS = ServerSettings(
    host="::1",
    port=0,
    agents_file=Path("a.toml"),
    resume_grace=0,
    retention=60,
    keep_runs_days=0.5,
    drain=1.5,
    database_url="postgresql://here/db",
    cors_origins=("https://a", "https://b"),
    allowed_provider_hosts=("h:1",),
    allowed_key_variables=("KEY",),
    allowed_tools=("files.*", "weather"),
    otel=True,
)


class Served:
    """What ``lumos serve`` would have run with."""

    settings: ServerSettings
    log_level: str


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """Let ``lumos serve`` note its settings and return."""
    noted = Served()

    async def run_server(settings: ServerSettings) -> None:
        noted.settings = settings

    monkeypatch.setattr("server.compose.run_server", run_server)
    monkeypatch.setattr("server.logs.configure_logging", lambda level: setattr(noted, "log_level", level))
    return noted


def test_the_commands() -> None:
    assert COMMANDS == ["chat", "keys", "providers", "record", "replay", "serve", "simulate"]


def test_the_help_of_lumos_names_every_command() -> None:
    shown = lumos("-h").stdout
    for name, command in main.commands.items():
        assert re.search(rf"^  {name} +{re.escape(command.get_short_help_str(100))}$", shown, re.MULTILINE)


def test_lumos_alone_shows_the_help() -> None:
    assert lumos().output == lumos("--help").stdout


def test_the_version_is_the_package_s() -> None:
    assert re.fullmatch(r"lumos, version \d+\.\d+\.\d+\n", lumos("--version").stdout)


@pytest.mark.parametrize(("words", "option"), [*options_of(main)])
def test_every_option_is_an_environment_variable_and_explained(words: tuple[str, ...], option: click.Option) -> None:
    prefix = "LUMOS_REPLAY_" if (*words, option.opts[0]) in OPTIONS_OF_THE_MOCK else "LUMOS_"
    if words[0] == "keys" and option.opts[0] != "--database-url":
        prefix = "LUMOS_KEY_"
    variable = prefix + option.opts[0].removeprefix("--").replace("-", "_").upper()
    assert option.envvar == variable
    assert option.help
    assert option.help[0].isupper()
    help_text = " ".join(lumos(*words, "--help").stdout.split())
    assert " ".join(option.help.split()) in help_text
    assert f"env var: {variable}" in help_text


def test_what_is_counted_in_days_says_so() -> None:
    shown = " ".join(lumos("serve", "--help").stdout.split())
    assert "--keep-runs DAYS How long the store keeps runs' events." in shown


def test_serve_has_its_defaults(served: Served) -> None:
    assert lumos("serve", env={"LUMOS_AGENTS": None, "LUMOS_DATABASE_URL": None}).exit_code == 0
    assert served.settings == ServerSettings()
    assert served.log_level == "info"


def test_serve_takes_every_option(served: Served) -> None:
    lumos("serve", "--host", "::1", "--port", "0", "--agents", "a.toml", "--resume-grace", "0", "--drain", "1.5",
          "--retention", "60", "--keep-runs", "0.5", "--database-url", "postgresql://here/db",
          "--cors-origin", "https://a", "--cors-origin", "https://b",
          "--allow-provider-host", "h:1", "--allow-key-variable", "KEY", "--otel",
          "--allow-tool", "files.*", "--allow-tool", "weather")  # fmt: skip
    assert served.settings == SETTINGS


def test_serve_takes_every_option_from_the_environment(served: Served) -> None:
    variables = {
        "LUMOS_HOST": "::1",
        "LUMOS_PORT": "0",
        "LUMOS_AGENTS": "a.toml",
        "LUMOS_LOG_LEVEL": "WARNING",
        "LUMOS_RESUME_GRACE": "0",
        "LUMOS_RETENTION": "60",
        "LUMOS_KEEP_RUNS": "0.5",
        "LUMOS_DRAIN": "1.5",
        "LUMOS_DATABASE_URL": "postgresql://here/db",
        "LUMOS_CORS_ORIGIN": "https://a https://b",
        "LUMOS_ALLOW_PROVIDER_HOST": "h:1",
        "LUMOS_ALLOW_KEY_VARIABLE": "KEY",
        "LUMOS_ALLOW_TOOL": "files.* weather",
        "LUMOS_OTEL": "1",
    }
    lumos("serve", env=variables)
    assert served.settings == SETTINGS
    assert served.log_level == "warning"


def test_an_option_wins_over_its_variable(served: Served) -> None:
    lumos("serve", "--port", "1", env={"LUMOS_PORT": "2"})
    assert served.settings.port == 1


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon", ""])
def test_seconds_are_a_finite_number(served: Served, seconds: str) -> None:
    result = lumos("serve", "--drain", seconds)
    assert result.exit_code == 2
    assert f"{seconds!r} is not a number of seconds, 0 or more" in result.stderr


@pytest.mark.parametrize("option", [["--port", "65536"], ["--log-level", "loud"], ["--nonsense"]])
def test_a_wrong_option_is_a_usage_error(served: Served, option: list[str]) -> None:
    result = lumos("serve", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


def test_the_log_levels_are_those_of_the_log(served: Served) -> None:
    assert LOG_LEVELS == logs.LOG_LEVELS


@pytest.mark.usefixtures("quiet_log")
class TestServeGivesUp:
    """In one line, with exit code 1."""

    @pytest.fixture
    def quiet_log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.logs.configure_logging", lambda level: None)

    def test_when_the_port_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            line = complaint(lumos("serve", "--port", port, env=NO_AGENTS_FROM_OUTSIDE))
        assert line == f"cannot listen on 127.0.0.1:{port}: Address already in use"

    def test_when_there_is_no_such_host(self) -> None:
        line = complaint(lumos("serve", "--host", "no host", "--port", "0", env=NO_AGENTS_FROM_OUTSIDE))
        assert line.startswith("cannot listen on no host:0: ")

    def test_when_there_is_no_such_agents_file(self, tmp_path: Path) -> None:
        missing = tmp_path / "agents.toml"
        assert complaint(lumos("serve", "--agents", missing)) == f"{missing}: No such file or directory"

    def test_when_the_agents_file_is_broken(self, tmp_path: Path) -> None:
        agents = write_agents(tmp_path, "[[agent")
        assert complaint(lumos("serve", "--agents", agents)).startswith(f"{agents}: ")

    def test_when_a_key_is_missing(self, tmp_path: Path) -> None:
        agents = write_agents(tmp_path, agent_at("http://localhost") + 'api_key_env = "SOME_KEY"')
        line = complaint(lumos("serve", "--agents", agents, env={"SOME_KEY": None}))
        assert line.startswith("agent 'local': ")
        assert "SOME_KEY" in line

    def test_when_a_key_is_none_and_does_not_show_it(self, tmp_path: Path) -> None:
        agents = write_agents(tmp_path, agent_at("http://localhost") + 'api_key_env = "SOME_KEY"')
        line = complaint(lumos("serve", "--agents", agents, env={"SOME_KEY": "sk-s€cret"}))
        assert "SOME_KEY" in line
        assert "s€cret" not in line

    def test_when_the_proxy_is_none(self) -> None:
        variables = {**NO_AGENTS_FROM_OUTSIDE, "https_proxy": "socks5://somewhere"}
        assert "https_proxy names a SOCKS proxy" in complaint(lumos("serve", "--port", "0", env=variables))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), BaseExceptionGroup("of a nursery", [KeyboardInterrupt()])])
def test_ctrl_c_at_any_other_time_ends_the_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, interrupt: BaseException
) -> None:
    async def converse(*_: object) -> bool:
        raise interrupt

    monkeypatch.setattr("server.conversation.converse", converse)
    result = lumos("chat", "Hello")
    assert (result.exit_code, result.output.strip()) == (1, "Aborted!")


def test_serve_serves_until_sigterm(tmp_path: Path) -> None:
    agents = write_agents(tmp_path, agent_at("http://localhost"))
    database = f"sqlite:///{tmp_path}/lumos.db"
    command = [str(LUMOS), "serve", "--port", "0", "--agents", str(agents), "--database-url", database]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            started = json.loads(process.stderr.readline())
            assert started["event"] == "server.started"
            assert started["agents"] == ["demo", "demo-93s", "demo-tools", "local"]
            assert httpx.get(f"{started['url']}/health/ready", trust_env=False).status_code == 200
            process.send_signal(signal.SIGTERM)
            ended = [json.loads(line)["event"] for line in process.stderr]
            assert ended == ["server.draining", "server.ended"]
            assert process.wait(10) == 0
        finally:
            process.kill()


def modules_after(*arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded when the command is done."""
    script = "import sys; from server.cli import main; main(sys.argv[1:], standalone_mode=False)"
    listing = "; print([name.partition('.')[0] for name in sys.modules], file=sys.stderr)"
    run: Any = subprocess.run(
        [sys.executable, "-c", script + listing, *arguments], capture_output=True, text=True, timeout=50, check=True
    )
    return set(json.loads(run.stderr.replace("'", '"')))


def test_the_help_loads_nothing_of_the_server() -> None:
    assert not modules_after("--help") & {"trio", "msgspec", "httpx", "quart", "hypercorn", "structlog", "engine"}


def test_the_list_of_recordings_loads_no_http() -> None:
    assert not modules_after("replay", "--list") & {"httpx", "quart", "hypercorn", "structlog"}


def test_an_empty_host_is_not_every_address() -> None:
    ended = lumos("serve", "--host", " ")
    assert ended.exit_code == 2
    assert "0.0.0.0 is every one" in ended.output
