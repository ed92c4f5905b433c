"""The two workloads that are no load on an arm: start-up (W8) and how exactly Lumos replays (W9)."""

from __future__ import annotations

import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.bench import metrics
from benchmarks.bench.arms import Arm, RunningArm
from benchmarks.bench.launching import MOST_RUNS, python_for
from benchmarks.bench.metrics import Metrics
from benchmarks.bench.process import free_port, running
from benchmarks.bench.result import Trial
from benchmarks.bench.stamps import stamp
from benchmarks.bench.trial import Place, observe, settle
from benchmarks.bench.workloads import Step, spread, to_job
from engine.pieces import Piece, TextPiece
from providers.recording import RecordedRead, Recording, dump, load

START = "w8"
REPLAY = "w9"
SPECIAL_TITLES = {START: "Start-up and import", REPLAY: "Replay accuracy"}

IMPORTS = {
    "lumos": "import engine",
    "fastapi-aiohttp": "import fastapi, aiohttp",
    "fastapi-httpx": "import fastapi, httpx",
    "fastapi-openai": "import fastapi, openai",
    "openai-agents": "import agents",
    "pydantic-ai": "import pydantic_ai",
    "litellm": "import litellm",
}
"""What a program that uses it has to import."""

_TRIES = 5
_REPLAY_AGENT = '[[agent]]\nid = "bench"\nsystem = ""\nllm_config = {{ provider = "replay", model = "{}" }}\n'
_PATH = "/api/v1/agents/bench/chat/lumosai/stream"


def start_trial(arm: Arm, started: RunningArm, number: int, *, imports: bool) -> Trial:
    """From exec to the first 200, of the start that there was anyway; and what it takes to import, if wanted."""
    found: Metrics = {"start_ms": round(started.process.start_seconds * 1000, 1)}
    if imports and (statement := IMPORTS.get(arm.name)):
        python = python_for(arm.environment)
        found["import_ms"] = round((run_seconds(python, statement) - run_seconds(python, "pass")) * 1000, 1)
    return Trial(arm=arm.name, workload=START, n=1, round=number, metrics=found)


def run_seconds(python: Path, statement: str) -> float:
    """The quickest of some runs of a new interpreter, bytecode compiled: noise only ever adds."""
    taken = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        subprocess.run([str(python), "-c", statement], check=True, capture_output=True, cwd=Path(__file__).parents[2])
        taken.append(time.perf_counter() - began)
    return min(taken)


def stamped(recording: Recording) -> Recording:
    """The recording with a stamp for each piece of text: where in time it belongs."""
    count = sum(isinstance(piece, TextPiece) for read in recording.reads for piece in read.pieces)
    reads, number = [], 0
    for read in recording.reads:
        pieces: list[Piece] = []
        for piece in read.pieces:
            if isinstance(piece, TextPiece):
                pieces.append(TextPiece(stamp(number, 0, read.at_ns, last=number == count - 1)))
                number += 1
            else:
                pieces.append(piece)
        reads.append(RecordedRead(read.at_ns, tuple(pieces)))
    return Recording(msgspec.structs.replace(recording.header, name="bench", request=None), tuple(reads))


def replay_trial(place: Place, number: int, *, core: int | None, full: bool) -> Trial:
    """100 streams of ``lumos serve`` whose model is a recording: each event against its place in it."""
    with tempfile.TemporaryDirectory(prefix="bench-replay-") as name:
        folder = Path(name)
        dump(stamped(load("gpt4o-13s" if full else "gpt4o-short")), folder / "bench.jsonl")
        (folder / "agents.toml").write_text(_REPLAY_AGENT.format(folder / "bench.jsonl"))
        port = free_port()
        command = [str(Path(sysconfig.get_path("scripts")) / "lumos"), "serve", "--port", str(port), "--agents"]
        command += ["agents.toml", "--database-url", "sqlite:///lumos.db", "--max-runs", str(MOST_RUNS), "--drain", "0"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": name}
        with running(command, environment, port=port, ready_path="/health/ready", folder=folder, core=core) as server:
            body = '{"message":"hi","session_id":"s-@TAG@","user_id":"s-@TAG@"}'
            headers = {"Content-Type": "application/json"}
            for count in (5, 100):  # the first to warm up
                step = Step(n=count, script="", starts_s=spread(count, 1))
                job = to_job(step, port, _PATH, headers, body, first_tag=1000 * count)
                seen = observe(place, server, msgspec.structs.replace(job, stamps="offset", patience_s=30))
            settle(place, server)
    found = metrics.failures(seen) | metrics.replay_errors(seen) | metrics.cost(seen)
    return Trial(arm="lumos", workload=REPLAY, n=100, round=number, metrics=found, hist=metrics.histograms(seen))
