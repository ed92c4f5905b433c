"""``lumos record`` and ``lumos replay``: an answer to a file with its timing, and back to the terminal."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path

import click
import trio

from engine import BasicAgent, Deadlines, StreamingAgent
from providers.http import open_client
from providers.recorder import Recorder
from providers.recording import Recording, dump
from providers.registry import ModelConfig, create_provider
from providers.replay import ReplayProvider

from .terminal import StreamSummary, show_stream, show_summary

LONGEST_ANSWER = Deadlines(total=3600, first_token=600, idle=120)


def record_answer(
    base_url: str,
    model: str,
    prompt: str,
    api_key_env: str | None,
    output: Path,
    recorded: datetime.date,
    environment: Mapping[str, str],
) -> bool:
    """Ask the API, show the answer and write the recording. False if the answer failed: the recording says so.

    Raises:
        ProviderConfigError: bad URL, or no key in that variable.
        OSError: the file cannot be written.
    """
    config = ModelConfig(provider="openai_compatible", model=model, base_url=base_url, api_key_env=api_key_env)

    async def ask() -> tuple[StreamSummary, Recorder]:
        async with open_client() as client:
            recorder = Recorder(create_provider(config, environment, client))
            agent = BasicAgent(
                agent_id="recorded", provider=recorder, model=model, instructions="", deadlines=LONGEST_ANSWER
            )
            return await _show(agent, prompt), recorder

    summary, recorder = trio.run(ask)
    show_summary(summary)
    recording = recorder.recording(
        name=_recording_name(output),
        title=f"{model}: {prompt[:60]}",
        recorded=recorded,
        source=f"lumos record --base-url {base_url} --model {model}",
        licence="",
    )
    dump(recording, output)
    click.secho(f"{len(recording.reads)} reads, {recording.duration_ns / 1e9:.2f} s -> {output}", err=True)
    return not summary.failed


async def show_replay(recording: Recording) -> StreamSummary:
    """Replay the recording into the terminal."""
    agent = BasicAgent(
        agent_id="replayed", provider=ReplayProvider(recording), model="", instructions="", deadlines=LONGEST_ANSWER
    )
    return await _show(agent, recording.header.prompt)


async def _show(agent: BasicAgent, prompt: str) -> StreamSummary:
    started_at = trio.current_time()
    async with StreamingAgent.with_config(agent, agent.streaming).execute_streaming(prompt) as events:
        return await show_stream(events, started_at)


def _recording_name(output: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", output.stem.lower()).strip("-") or "recording"
