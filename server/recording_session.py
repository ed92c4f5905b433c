"""``lumos record`` and ``lumos replay``: an answer to a file with its timing, and back to the terminal."""

from __future__ import annotations

import datetime
import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

import click

from engine import BasicAgent, Deadlines, StreamingAgent
from providers.http import open_client
from providers.recorder import Recorder
from providers.recording import Recording, dump
from providers.registry import ModelConfig, create_single_provider
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
    """Ask the API, show the answer and write the recording. False if the answer is not whole: the recording says so.

    An answer that failed before it said anything is not written.

    Raises:
        ProviderConfigError: bad URL, or no key in that variable.
        NetworkConfigError: the environment names no usable proxy or certificates.
        OSError: the file cannot be written.
    """
    async with open_client(environment=environment) as client:
        recorder = Recorder(create_single_provider(config, environment, client))  # one request: no retries in it
        agent = BasicAgent(
            agent_id="recorded", provider=recorder, model=config.model, instructions="", deadlines=LONGEST_ANSWER
        )
        summary = await show_answer(StreamingAgent.with_config(agent, agent.streaming).execute_streaming(prompt))
    show_summary(summary)
    if summary.ttfb is None and summary.failed:
        click.secho("nothing to record", err=True)
        return False
    recording = recorder.recording(
        name=_recording_name(output),
        title=f"{config.model}: {' '.join(prompt.split())[:60]}",
        recorded=recorded,
        source=f"lumos record --base-url {config.base_url} --model {config.model}",
        licence="",
    )
    dump(recording, output)
    incomplete = ", incomplete" if summary.failed else ""
    seconds = recording.duration_ns / 1e9
    click.secho(f"{len(recording.reads)} reads, {seconds:.2f} s{incomplete} -> {output}", err=True)
    return not summary.failed


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


def _recording_name(output: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", output.stem.lower()).strip("-") or "recording"
