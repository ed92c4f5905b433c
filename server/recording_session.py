"""``lumos record`` and ``lumos replay``: an answer to a file with its timing, and back to the terminal."""

from __future__ import annotations

import datetime
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import msgspec

from engine import BasicAgent, Deadlines, StreamingAgent
from providers.http import open_client
from providers.importers import UnknownImportError, import_recordings
from providers.recorder import Recorder
from providers.recording import Recording, dump
from providers.registry import ModelConfig, create_single_provider, default_model
from providers.replay import ReplayProvider

from .terminal import show_answer, show_summary

LONGEST_ANSWER = Deadlines(total=3600, first_token=600, idle=120)


def check_output(output: Path, *, force: bool) -> None:
    """See before the model is asked, and paid, that its answer can be written.

    Raises:
        OSError: it is there already and ``force`` is not said, or its directory is not to be written to.
    """
    if output.exists() and not force:
        raise FileExistsError(errno.EEXIST, "is there already; --force replaces it", str(output))
    if not os.access(output.parent, os.W_OK):
        reason = errno.EACCES if output.parent.is_dir() else errno.ENOENT
        raise OSError(reason, os.strerror(reason), str(output.parent))


async def record_answer(
    config: ModelConfig, prompt: str, output: Path, recorded: datetime.date, environment: Mapping[str, str]
) -> bool:
    """Ask the provider, show the answer and write the recording. False if it is not whole: the recording says so.

    The recording has the vendor's own bytes too. An answer that failed before it said anything is not written.

    Raises:
        ProviderConfigError: bad URL, or no key in that variable.
        NetworkConfigError: the environment names no usable proxy or certificates.
        OSError: the file cannot be written.
    """
    async with open_client(environment=environment) as client:
        recorder = Recorder(create_single_provider(config, environment, client))  # one request: no retries in it
        model = default_model(config)
        agent = BasicAgent(
            agent_id="recorded", provider=recorder, model=model, instructions="", deadlines=LONGEST_ANSWER
        )
        summary = await show_answer(StreamingAgent.with_config(agent, agent.streaming).execute_streaming(prompt))
    show_summary(summary)
    if summary.ttfb is None and summary.failed:
        click.secho("nothing to record", err=True)
        return False
    recording = recorder.recording(
        name=_recording_name(output),
        title=f"{model}: {' '.join(prompt.split())[:60]}",
        recorded=recorded,
        source=_command(config),
        licence="",
    )
    dump(recording, output)
    incomplete = ", incomplete" if summary.failed else ""
    seconds = recording.duration_ns / 1e9
    click.secho(f"{len(recording.reads)} reads, {seconds:.2f} s{incomplete} -> {output}", err=True)
    return not summary.failed


def import_file(source: Path, output: Path, *, index: int | None, seed: int, force: bool) -> None:
    """Write the recordings that a file of another tool holds: one to ``output``, several beside it with numbers.

    ``index`` picks one of them, from 1; ``seed`` is that of what the file leaves to chance.

    Raises:
        UnknownImportError: the file is of no known format, or has no such part.
        OSError: a file cannot be read or written, or is there already and ``force`` is not said.
    """
    recordings = import_recordings(source.read_bytes(), source.name, seed=seed)
    if index is not None:
        recordings = recordings[index - 1 : index]
        if not recordings:
            raise UnknownImportError(f"{source.name} has no answer {index}")
    paths = [output] if len(recordings) == 1 else list(_numbered(output, len(recordings)))
    for path in paths:
        check_output(path, force=force)
    for path, recording in zip(paths, recordings, strict=True):
        named = msgspec.structs.replace(recording.header, name=_recording_name(path))
        dump(Recording(named, recording.reads), path)
        click.secho(f"{len(recording.reads)} reads, {recording.duration_ns / 1e9:.2f} s -> {path}", err=True)


def _numbered(output: Path, count: int) -> Iterator[Path]:
    return (output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1))


async def show_replay(recording: Recording) -> bool:
    """Replay the recording into the terminal. False if it ends otherwise than with a whole answer."""
    agent = BasicAgent(
        agent_id="replayed",
        provider=ReplayProvider(recording),
        model="",
        instructions="",
        deadlines=replay_deadlines(recording),
    )
    streaming = StreamingAgent.with_config(agent, agent.streaming)
    summary = await show_answer(streaming.execute_streaming(recording.header.prompt))
    show_summary(summary)
    return not summary.failed


def replay_deadlines(recording: Recording) -> Deadlines:
    """Deadlines that no pause of the recording meets."""
    failure = recording.header.failure
    longest = 60 + max(recording.duration_ns, failure.at_ns if failure else 0) / 1e9
    return Deadlines(total=longest, first_token=longest, idle=longest)


def _command(config: ModelConfig) -> str:
    """The command that was given; a base URL holds no secret, or there would be no provider."""
    options = {
        "--provider": None if config.provider == "openai_compatible" else config.provider,
        "--base-url": config.base_url,
        "--model": config.model,
    }
    return " ".join(["lumos record", *(f"{name} {value}" for name, value in options.items() if value)])


def _recording_name(output: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", output.stem.lower()).strip("-") or "recording"
