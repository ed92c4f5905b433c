"""The command line: ``lumos serve | chat | keys | record | replay | …``. Every option is also a variable."""

from __future__ import annotations

import datetime
import gc
import io
import os
import sys
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .cli_simulate import simulate
from .cli_support import database_option, give_up, option, run
from .key_commands import keys

if TYPE_CHECKING:
    from providers.recording import Recording

    from .compose import ServerSettings


LOG_LEVELS = ("debug", "info", "warning", "error")

T = TypeVar("T")

_REPLAY = "LUMOS_REPLAY_"
"""The mock's own variables: it often runs beside ``lumos serve``."""

_AT_LEAST_ONE = click.IntRange(min=1)
_FILE = click.Path(dir_okay=False, path_type=Path)


def seconds(value: str | float) -> float:
    """A finite number of seconds, 0 or more, as click wants the type of an option; its name is in the help."""
    with suppress(ValueError):
        if 0 <= (number := float(value)) < inf:
            return number
    raise click.BadParameter(f"{value!r} is not a number of seconds, 0 or more")


def days(value: str | float) -> float:
    """As ``seconds``, of days."""
    with suppress(click.BadParameter):
        return seconds(value)
    raise click.BadParameter(f"{value!r} is not a number of days, 0 or more")


def address(value: str) -> str:
    """An address to listen on, as click wants the type of an option. An empty one would be every address there is."""
    if value.strip():
        return value
    raise click.BadParameter("name an address; 0.0.0.0 is every one of this machine")


@click.group("lumos", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="lumos-stream")
def main() -> None:
    """Lumos streams LLM agents, token by token."""
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without emoji is no reason to break off


@main.command()
@option("--host", default="127.0.0.1", show_default=True, type=address, help="Address to listen on.")
@option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@option("--agents", type=_FILE, help="TOML file with [[agent]] tables.")
@option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    help="Least level logged.",
)
@option(
    "--resume-grace",
    default=5.0,
    show_default=True,
    type=seconds,
    help="How long a run goes on without a reader.",
)
@option("--retention", default=600.0, show_default=True, type=seconds, help="How long ended runs stay in memory.")
@option(
    "--keep-runs",
    default=30.0,
    show_default=True,
    type=days,
    metavar="DAYS",
    help="How long the store keeps runs' events.",
)
@option("--drain", default=30.0, show_default=True, type=seconds, help="How long streams go on after SIGTERM.")
@database_option
@option("--cors-origin", multiple=True, help="Origin whose pages may use the server; * for all. May be repeated.")
@option("--allow-provider-host", multiple=True, help="Host that tenants' admins may set as base_url. May be repeated.")
@option("--allow-key-variable", multiple=True, help="Variable that they may name for a key. May be repeated.")
@option("--allow-tool", multiple=True, help="Tool, or files.*, that API agents may name with keys. May be repeated.")
@option("--otel", is_flag=True, help="Send traces of runs by OTLP, where the OTEL_ variables say.")
@option("--max-runs", default=1000, show_default=True, type=_AT_LEAST_ONE, help="Runs at once.")
@option("--queue", default=100, show_default=True, type=click.IntRange(min=0), help="Starts that wait for a place.")
@option("--queue-seconds", default=5.0, show_default=True, type=seconds, help="How long they wait before a 503.")
@option("--share-secret", default="", help="Signs share links, 16 characters or more.  [default: random, till the end]")
@option("--redis-url", help="Redis or Valkey that workers share runs by: redis://HOST:6379/0.  [default: none]")
@option("--lease", default=10.0, show_default=True, type=seconds, help="Silence after which a worker counts as dead.")
@option("--workers", default=1, show_default=True, type=_AT_LEAST_ONE, help="Processes; more than one needs Redis.")
@option("--max-connections", default=10_000, show_default=True, type=_AT_LEAST_ONE, help="Connections at once.")
def serve(host: str, port: int, log_level: str, agents: Path | None, **options: Any) -> None:
    """Serve agents over HTTP, until SIGTERM or Ctrl-C."""
    gc.disable()  # nearly all that the imports make stays; ``collect_seldom`` turns it on again
    try:
        _serve(host, port, log_level, agents, **options)
    finally:
        gc.enable()


def _serve(host: str, port: int, log_level: str, agents: Path | None, **options: Any) -> None:
    from .admission import AdmissionLimits
    from .compose import ServerSettings, run_server
    from .logs import configure_logging
    from .serving import ServingLimits

    configure_logging(log_level)
    settings = ServerSettings(
        host=host,
        port=port,
        agents_file=agents,
        database_url=options["database_url"],
        resume_grace=options["resume_grace"],
        retention=options["retention"],
        keep_runs_days=options["keep_runs"],
        drain=options["drain"],
        cors_origins=options["cors_origin"],
        allowed_provider_hosts=options["allow_provider_host"],
        allowed_key_variables=options["allow_key_variable"],
        allowed_tools=options["allow_tool"],
        otel=options["otel"],
        admission=AdmissionLimits(
            runs=options["max_runs"], queue=options["queue"], queue_seconds=options["queue_seconds"]
        ),
        share_secret=options["share_secret"],
        redis_url=options["redis_url"],
        lease=options["lease"],
        workers=options["workers"],
        limits=ServingLimits(connections=options["max_connections"]),
    )
    try:
        if settings.workers == 1:
            run(run_server, settings)
        else:
            _serve_with_workers(settings, log_level)
    except OSError as error:
        give_up(f"cannot listen on {host}:{port}: {error.strerror or error}")


def _serve_with_workers(settings: ServerSettings, log_level: str) -> None:
    from .workers import WorkersFailedError, run_workers

    try:
        run(run_workers, settings, log_level)
    except WorkersFailedError:
        sys.exit(1)


@main.command()
@click.argument("message", required=False)
@option("--agent", default="demo", show_default=True, help="The agent's id.")
@option("--agents", type=_FILE, help="TOML file with [[agent]] tables.")
@option("--url", help="A running server to talk to, instead of an agent in this process.")
@option("--api-key", help="That server's API key. Better as the variable: others see a command's options.")
def chat(message: str | None, agent: str, agents: Path | None, url: str | None, api_key: str | None) -> None:
    """Stream an answer in the terminal, with TTFB and tokens/s.

    Without MESSAGE it asks for messages until the input ends.
    """
    from .conversation import converse

    if message is not None and not message.strip():
        give_up("the message is blank")
    sys.exit(0 if run(converse, agent, agents, url, message, api_key) else 1)


@main.command()
@option("--provider", help="Whom to ask, by the names of `lumos providers`.  [default: any OpenAI-compatible API]")
@option("--base-url", help="Where the API is, as https://api.openai.com/v1.  [default: the provider's]")
@option("--model", help="The model's name there.  [default: the provider's]")
@option("--prompt", help="What to ask.")
@option("--api-key-env", help="The environment variable that holds the key.  [default: the provider's]")
@option("--output", required=True, type=_FILE, help="The .jsonl file to write.")
@option("--force", is_flag=True, help="Replace the file if it is there.")
@option("--import", "imported", type=_FILE, help="Ask nobody: take aimock fixtures, a vLLM benchmark or a trace.")
@option("--index", type=click.IntRange(min=1), help="Which answer of the imported file.  [default: all]")
@option("--seed", default=0, show_default=True, help="Of what the imported file leaves to chance.")
@click.pass_context
def record(context: click.Context, /, output: Path, force: bool, **options: Any) -> None:
    """Record an answer with its timing and its bytes, or import one."""
    try:
        if options["imported"] is not None:
            _import(output, force, **options)
            return
        complete = _record(context, output, force, **options)
    except OSError as error:
        give_up(_file_trouble(error, output))
    sys.exit(0 if complete else 1)


def _record(
    context: click.Context,
    output: Path,
    force: bool,
    *,
    provider: str | None,
    base_url: str | None,
    model: str | None,
    prompt: str | None,
    api_key_env: str | None,
    **_: object,
) -> bool:
    from providers.registry import ModelConfig

    from .recording_session import check_output, record_answer

    needed = {"prompt": prompt} if provider else {"base_url": base_url, "model": model, "prompt": prompt}
    for parameter in context.command.params:
        if parameter.name in needed and not needed[parameter.name]:
            raise click.MissingParameter(ctx=context, param=parameter)
    config = ModelConfig(
        provider=provider or "openai_compatible", model=model or "", base_url=base_url, api_key_env=api_key_env
    )
    check_output(output, force=force)
    today = datetime.datetime.now(datetime.UTC).date()
    return run(record_answer, config, prompt, output, today, os.environ)


def _import(output: Path, force: bool, *, imported: Path, index: int | None, seed: int, **_: object) -> None:
    from providers.importers import UnknownImportError

    from .recording_session import import_file

    try:
        import_file(imported, output, index=index, seed=seed, force=force)
    except UnknownImportError as error:
        give_up(str(error))


@main.command()
@click.argument("name", required=False)
@option("--list", "list_them", is_flag=True, help="List the packaged recordings.")
@option("--measure", is_flag=True, help="Replay over a real socket and show how exact the times are.")
@option(
    "--serve", "serve_it", is_flag=True, help="Mock the vendors' APIs with it; without NAME, models name recordings."
)
@option("--provider", "providers", multiple=True, help="Whose API to mock; may be repeated.  [default: all]")
@option(
    "--host",
    prefix=_REPLAY,
    default="127.0.0.1",
    show_default=True,
    type=address,
    help="Address that the mock listens on.",
)
@option(
    "--port",
    prefix=_REPLAY,
    default=8081,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Its port; 0 takes a free one.",
)
def replay(
    name: str | None, list_them: bool, measure: bool, serve_it: bool, providers: tuple[str, ...], host: str, port: int
) -> None:
    """Replay a recording with its own timing. NAME is a packaged recording or a file."""
    if list_them:
        _list_recordings()
        return
    if serve_it:
        _serve_vendors(None if name is None else _load(name), providers, host, port)
        return
    if name is None:
        raise click.UsageError("name a recording, or use --list")
    recording = _load(name)
    if measure:
        from .measure import show_accuracy as show
    else:
        from .recording_session import show_replay as show
    sys.exit(0 if run(show, recording) else 1)


@main.group(invoke_without_command=True)
@click.pass_context
def providers(context: click.Context) -> None:
    """List the providers, and what of them is configured here."""
    from .provider_table import show_providers

    if context.invoked_subcommand is None:
        show_providers(os.environ)


@providers.command()
@click.argument("name")
@option("--model", help="The model's name there.  [default: the provider's]")
@option("--base-url", help="Where the API is.  [default: the provider's]")
@option("--api-key-env", help="The environment variable that holds the key.  [default: the provider's]")
def check(name: str, model: str | None, base_url: str | None, api_key_env: str | None) -> None:
    """Make one tiny real call to provider NAME."""
    from providers.registry import ModelConfig

    from .provider_table import check_provider

    config = ModelConfig(provider=name, model=model or "", base_url=base_url, api_key_env=api_key_env)
    sys.exit(0 if run(check_provider, config, os.environ) else 1)


main.add_command(keys)
main.add_command(simulate)


def _load(name: str) -> Recording:
    from providers.recording import RecordingError, load

    try:
        return load(name)
    except RecordingError as error:
        give_up(str(error))
    except OSError as error:
        give_up(_file_trouble(error, name))


def _serve_vendors(recording: Recording | None, providers: tuple[str, ...], host: str, port: int) -> None:
    from .logs import configure_logging
    from .vendor_session import mocked_providers, serve_vendors

    configure_logging("warning")
    try:
        mocked = mocked_providers(providers)
    except ValueError as error:
        give_up(str(error))
    try:
        run(serve_vendors, recording, mocked, host, port)
    except OSError as error:
        give_up(f"cannot listen on {host}:{port}: {error.strerror or error}")


def _list_recordings() -> None:
    from providers.recording import load, names

    for name in names():
        recording = load(name)
        duration = recording.duration_ns / 1e9
        click.echo(f"{name:16} {duration:7.2f} s {len(recording.reads):5} reads  {recording.header.title}")


def _file_trouble(error: OSError, path: Path | str) -> str:
    return f"{error.filename or path}: {error.strerror or error}"
