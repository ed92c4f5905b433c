"""Streaming against waiting: when the first words of one answer reach the client, three ways, over real sockets.

    make bench-ttfb [ARGS="--agent demo-93s --rounds 1 --at-once"]

Starts a real ``lumos serve`` on a free port of the loopback and asks one agent, which replays a recording, the same
question in three ways: the streaming endpoint, the one that answers whole, and the old way (generate everything, then
cut it up). First content is the first event with text; of the whole answer, its first byte. Rounds are interleaved and
rotated, every request is a connection of its own, and one warm-up round on another agent comes first. It stops by
itself: each answer has the run's total deadline.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TypeAlias

import click
import httpx
import msgspec
import trio

from engine import Deadlines, GenerationComplete, TextDelta
from providers.http import open_client
from providers.recording import names
from server.remote import remote_run

ROOT = Path(__file__).parent.parent
PROMPT = "What is structured concurrency, and why would a chat server want it?"
WARM_UP = "warm-up"
RECORDED = "recorded"
START_SECONDS = 30
LONGEST_ANSWER_SECONDS = Deadlines().total + 10
PACKAGES = ("trio", "quart-trio", "hypercorn", "httpx", "h11", "msgspec")

AGENT_TABLE = '[[agent]]\nid = "{}"\nsystem = ""\nllm_config = {{ provider = "replay", model = "{}" }}\n'


class Timing(msgspec.Struct, frozen=True):
    """Seconds from the request, at the client."""

    first_content: float
    total: float
    text: str


Way: TypeAlias = Callable[[httpx.AsyncClient, str, str], Awaitable[Timing]]


async def read_stream(client: httpx.AsyncClient, url: str, agent_id: str, *, way: str) -> Timing:
    """Ask an endpoint that answers in events."""
    first_content = None
    said: list[str] = []
    asked_at = trio.current_time()
    async with remote_run(client, url, agent_id, {"message": PROMPT}, way=way) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                first_content = first_content or events.arrived_at - asked_at
                said.append(event.content)
        total = trio.current_time() - asked_at
    if first_content is None or not isinstance(event, GenerationComplete):
        raise RuntimeError(f"{agent_id} did not answer by {way}: {event}")
    return Timing(first_content, total, "".join(said))


async def read_whole(client: httpx.AsyncClient, url: str, agent_id: str) -> Timing:
    """Ask the endpoint that answers whole."""
    asked_at = trio.current_time()
    endpoint = f"{url}/api/v1/agents/{agent_id}/chat/lumosai"
    async with client.stream("POST", endpoint, json={"message": PROMPT}) as response:
        first_byte = trio.current_time() - asked_at
        body = await response.aread()
        total = trio.current_time() - asked_at
    if response.status_code != httpx.codes.OK:
        raise RuntimeError(f"{agent_id} did not answer whole: HTTP {response.status_code}")
    return Timing(first_byte, total, msgspec.json.decode(body)["data"]["content"])


WAYS: dict[str, Way] = {
    "streaming": partial(read_stream, way="/stream"),
    "whole answer": read_whole,
    "simulated streaming": partial(read_stream, way="/simulated"),
}


class Trial(msgspec.Struct, frozen=True):
    """One answer."""

    round: int
    way: str
    ttfe_ms: float
    total_ms: float


async def play_round(url: str, agent_id: str, number: int, *, at_once: bool) -> list[Trial]:
    """Ask in all ways, each round in another order; all have to get the same text."""
    turn = number % len(WAYS)
    order = [*WAYS][turn:] + [*WAYS][:turn]
    timings: dict[str, Timing] = {}

    async def ask(way: str) -> None:
        async with open_client(_connect) as client:
            timings[way] = await WAYS[way](client, url, agent_id)

    if at_once:
        async with trio.open_nursery() as nursery:
            for way in order:
                nursery.start_soon(ask, way)
    else:
        for way in order:
            await ask(way)
    if len({timing.text for timing in timings.values()}) != 1:
        raise RuntimeError("the answers differ")
    return [
        Trial(number, way, round(timing.first_content * 1000, 3), round(timing.total * 1000, 3))
        for way, timing in timings.items()
    ]


async def _connect(host: str, port: int, tls: bool) -> trio.abc.Stream:
    """Without TLS, and so without 25 ms for certificates."""
    assert not tls
    return await trio.open_tcp_stream(host, port)


async def measure(url: str, agent_id: str, rounds: int, *, at_once: bool) -> list[Trial]:
    """All rounds, after a short one that lets the server import what it needs."""
    answers = 1 if at_once else len(WAYS)
    with trio.fail_after(60 + rounds * answers * LONGEST_ANSWER_SECONDS):
        await play_round(url, WARM_UP, 0, at_once=True)
        trials: list[Trial] = []
        for number in range(rounds):
            trials += await play_round(url, agent_id, number, at_once=at_once)
        return trials


@contextmanager
def running_server(recording: str | None) -> Iterator[str]:
    """The URL of a ``lumos serve``, which ends with the block; its agent ``recorded`` replays that recording."""
    lumos = Path(sysconfig.get_path("scripts")) / "lumos"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUMOS_")}
    with tempfile.TemporaryDirectory() as directory:
        agents, log = Path(directory) / "agents.toml", Path(directory) / "log"
        agents.write_text(
            AGENT_TABLE.format(WARM_UP, "gpt4o-short") + AGENT_TABLE.format(RECORDED, recording or "gpt4o-short")
        )
        command = [str(lumos), "serve", "--port", "0", "--agents", str(agents)]
        command += ["--database-url", f"sqlite:///{directory}/lumos.db"]
        with log.open("wb") as stderr, subprocess.Popen(command, env=environment, stderr=stderr) as server:
            try:
                yield _started_url(server, log)
            finally:
                server.terminate()


def _started_url(server: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server's log tells where it listens."""
    deadline = time.monotonic() + START_SECONDS
    while not (line := log.read_text()).endswith("\n"):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"lumos serve did not start: {line}")
        time.sleep(0.02)
    url: str = msgspec.json.decode(line.splitlines()[0])["url"]
    return url


class Summary(msgspec.Struct, frozen=True):
    """Medians over the rounds; the ratios are to streaming."""

    way: str
    ttfe_ms: float
    total_ms: float
    ttfe_ratio: float
    total_ratio: float


def summarize(trials: Sequence[Trial]) -> list[Summary]:
    """One line for each way, in the order of ``WAYS``."""
    medians = {
        way: (
            median(trial.ttfe_ms for trial in trials if trial.way == way),
            median(trial.total_ms for trial in trials if trial.way == way),
        )
        for way in WAYS
    }
    first, whole = medians["streaming"]
    return [
        Summary(way, ttfe, total, round(ttfe / first, 3), round(total / whole, 3))
        for way, (ttfe, total) in medians.items()
    ]


class Environment(msgspec.Struct, frozen=True):
    """Where it was measured."""

    git: str
    cpu: str
    cpus: int | None
    kernel: str
    python: str
    versions: dict[str, str]

    def line(self) -> str:
        """For the foot of a table."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"{self.cpu} ({self.cpus} CPUs), Linux {self.kernel}, Python {self.python}, {versions}; commit {self.git}"
        )


def this_environment() -> Environment:
    """Read from the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return Environment(
        git=commit.stdout.strip() or "none",
        cpu=models[0] if models else platform.machine(),
        cpus=os.cpu_count(),
        kernel=platform.release(),
        python=platform.python_version(),
        versions={package: version(package) for package in PACKAGES},
    )


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    schema: str = "lumos-ttfb/1"
    env: Environment
    agent: str
    rounds: int
    at_once: bool
    trials: list[Trial]
    summary: list[Summary]


def markdown(result: Result) -> str:
    """The table for the README, with what it was measured on."""
    rows = [
        f"| {line.way} | {line.ttfe_ms / 1000:.3f} s | {line.total_ms / 1000:.3f} s | {line.ttfe_ratio:.2f} |"
        for line in result.summary
    ]
    how = "the three at once" if result.at_once else "one after the other"
    rounds = "1 round" if result.rounds == 1 else f"medians of {result.rounds} interleaved rounds"
    return "\n".join(
        [
            "| | TTFB (first content) | total | TTFB to streaming's |",
            "|---|--:|--:|--:|",
            *rows,
            "",
            f"The same answer, replayed by `{result.agent}`; {rounds}, {how}, each on a new loopback connection.",
            f"{result.env.line()}.",
        ]
    )


@click.command()
@click.option("--agent", default="demo", show_default=True, help="A built-in agent; demo-93s is the long one.")
@click.option("--recording", type=click.Choice(names()), help="Replay this recording instead.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 100), help="How often each is asked.")
@click.option("--at-once", is_flag=True, help="Ask in the three ways at the same time: a third of the time.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(agent: str, recording: str | None, rounds: int, at_once: bool, as_json: bool) -> None:
    """Measure TTFB and total time: streamed, whole, and generated first and then cut up."""
    with running_server(recording) as url:
        trials = trio.run(partial(measure, url, RECORDED if recording else agent, rounds, at_once=at_once))
    result = Result(
        env=this_environment(),
        agent=recording or agent,
        rounds=rounds,
        at_once=at_once,
        trials=trials,
        summary=summarize(trials),
    )
    print(msgspec.json.encode(result).decode() if as_json else markdown(result))


if __name__ == "__main__":
    main()
