"""The command line: ``lumos serve | chat | record | replay``. Every option is also an environment variable."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from providers.recording import Recording

LOG_LEVELS = ("debug", "info", "warning", "error")

_AGENTS_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _option(name: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that is also ``LUMOS_NAME``, and says so in the help."""
    variable = "LUMOS_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, show_envvar=True, **settings)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lumos-stream")
def main() -> None:
    """Lumos streams LLM agents, token by token."""


@main.command()
@_option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@_option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@_option("--agents", type=_AGENTS_FILE, help="TOML file with [[agent]] tables.")
@_option("--log-level", default="info", show_default=True, type=click.Choice(LOG_LEVELS), help="Least level logged.")
@_option(
    "--resume-grace",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds that a run goes on without a reader.",
)
@_option(
    "--drain",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds that streams may go on after SIGTERM.",
)
def serve(host: str, port: int, agents: Path | None, log_level: str, resume_grace: float, drain: float) -> None:
    """Serve agents over HTTP, until SIGTERM or Ctrl-C."""
    import trio

    from .agents import AgentsFileError
    from .compose import ServerSettings, run_server
    from .logs import configure_logging

    configure_logging(log_level)
    settings = ServerSettings(host=host, port=port, agents_file=agents, resume_grace=resume_grace, drain=drain)
    try:
        trio.run(run_server, settings)
    except AgentsFileError as error:
        _give_up(str(error))
    except OSError as error:
        _give_up(f"cannot listen on {host}:{port}: {error.strerror or error}")


@main.command()
@click.argument("message", required=False)
@_option("--agent", default="demo", show_default=True, help="The agent's id.")
@_option("--agents", type=_AGENTS_FILE, help="TOML file with [[agent]] tables.")
@_option("--url", help="A running server to talk to, instead of an agent in this process.")
def chat(message: str | None, agent: str, agents: Path | None, url: str | None) -> None:
    """Stream an answer in the terminal, with TTFB and tokens per second.

    Without MESSAGE it asks for messages until the input ends.
    """
    from .agents import AgentsFileError
    from .conversation import UnknownAgentError, converse
    from .remote import RemoteError

    try:
        answered = converse(agent, agents, url, message)
    except (AgentsFileError, UnknownAgentError, RemoteError, ValueError) as error:
        _give_up(str(error))
    sys.exit(0 if answered else 1)


@main.command()
@_option("--base-url", required=True, help="The API's URL without /chat/completions, as https://api.openai.com/v1.")
@_option("--model", required=True, help="The model's name there.")
@_option("--prompt", required=True, help="What to ask.")
@_option("--api-key-env", help="The environment variable that holds the key.")
@_option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The .jsonl file to write.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def record(base_url: str, model: str, prompt: str, api_key_env: str | None, output: Path, force: bool) -> None:
    """Record an answer of any OpenAI-compatible API with its timing."""
    from .recording_session import record_answer

    if output.exists() and not force:
        _give_up(f"{output} is there already; --force replaces it")
    try:
        complete = record_answer(
            base_url, model, prompt, api_key_env, output, datetime.datetime.now(datetime.UTC).date(), os.environ
        )
    except (ValueError, OSError) as error:
        _give_up(str(error))
    sys.exit(0 if complete else 1)


@main.command()
@click.argument("name", required=False)
@click.option("--list", "list_them", is_flag=True, help="List the packaged recordings.")
@click.option("--measure", is_flag=True, help="Replay over a real socket and show how exact the times are.")
def replay(name: str | None, list_them: bool, measure: bool) -> None:
    """Replay a recording with its own timing. NAME is a packaged recording or a file."""
    from providers.recording import RecordingError, load

    if list_them:
        _list_recordings()
        return
    if name is None:
        raise click.UsageError("name a recording, or use --list")
    try:
        recording = load(name)
    except (RecordingError, OSError) as error:
        _give_up(str(error))
    _replay(recording, measure=measure)


def _list_recordings() -> None:
    from providers.recording import load, names

    for name in names():
        recording = load(name)
        seconds = recording.duration_ns / 1e9
        click.echo(f"{name:16} {seconds:7.2f} s {len(recording.reads):5} reads  {recording.header.title}")


def _replay(recording: Recording, *, measure: bool) -> None:
    import trio

    from .measure import measure_replay
    from .recording_session import show_replay
    from .terminal import show_summary

    if measure:
        click.echo(f"{recording.header.name}: {trio.run(measure_replay, recording).line()}")
    else:
        show_summary(trio.run(show_replay, recording))


def _give_up(message: str) -> NoReturn:
    click.secho(f"lumos: {message}", fg="red", err=True)
    sys.exit(1)
