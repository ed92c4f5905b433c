"""The two workloads that are no load on an arm: start-up (W8) and how exactly Lumos replays (W9)."""

from __future__ import annotations

import resource
import subprocess
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.bench import metrics
from benchmarks.bench.arms import Arm, RunningArm
from benchmarks.bench.calibration import CHAT_PATH, Limits, direct_body
from benchmarks.bench.environments import ROOT
from benchmarks.bench.launching import python_for
from benchmarks.bench.metrics import Metrics
from benchmarks.bench.process import free_port, running
from benchmarks.bench.result import Trial
from benchmarks.bench.stamps import stamp
from benchmarks.bench.trial import Place, observe, why_not_counted
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
"""What a program that uses it imports."""

IMPORTS_USED = IMPORTS | {"lumos": "from engine import StreamingAgent"}
"""What it needs to run: ``import engine`` alone loads next to nothing. Ours without a provider and its HTTP client."""

_RECORDING = "gpt4o-13s"
_TRIES = 5
_CLIENT_IN_TIME = Limits(upstream_ms=None, start_ms=2)
"""A client that opens connections late reads late too."""
_HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
_BODY = direct_body("one")


def start_trial(arm: Arm, started: RunningArm, number: int, *, imports: bool) -> Trial:
    """From exec to the first 200, of the start that there was anyway; and what it takes to import, if wanted."""
    found: Metrics = {"start_ms": round(started.process.start_seconds * 1000, 1)}
    if imports and arm.name in IMPORTS:
        found |= import_metrics(arm)
    return Trial(arm=arm.name, workload=START, n=1, round=number, metrics=found)


def import_metrics(arm: Arm) -> Metrics:
    """Over a bare interpreter: what is imported, and what has to be loaded for use; of peers one and the same."""
    python, imported, used = python_for(arm.environment), IMPORTS[arm.name], IMPORTS_USED[arm.name]
    seconds = {statement: run_seconds(python, statement) for statement in ("pass", *{imported, used})}
    found = {"import_ms": imported, "import_used_ms": used}
    return {name: round((seconds[statement] - seconds["pass"]) * 1000, 1) for name, statement in found.items()}


def run_seconds(python: Path, statement: str) -> float:
    """CPU time of a new interpreter, bytecode compiled: the least of some runs, as noise only ever adds."""
    taken = []
    for _ in range(_TRIES):
        before = _children_seconds()
        subprocess.run([str(python), "-c", statement], check=True, capture_output=True, cwd=ROOT)
        taken.append(_children_seconds() - before)
    return min(taken)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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


def replay_trial(place: Place, number: int, *, core: int | None, first: bool = False) -> Trial:
    """100 streams of ``lumos replay --serve``: each event against its place in the recording."""
    with tempfile.TemporaryDirectory(prefix="bench-replay-") as name:
        recording, port = Path(name) / "bench.jsonl", free_port()
        dump(stamped(load(_RECORDING)), recording)
        command = [str(Path(sysconfig.get_path("scripts")) / "lumos"), "replay", str(recording), "--serve"]
        command += ["--provider", "openai", "--port", str(port)]
        environment = {"PATH": "/usr/bin:/bin", "HOME": name, "PYTHONPATH": str(ROOT)}
        run = partial(running, command, environment, port=port, ready_path="", folder=Path(name))
        with run(core=core, first=first) as server:
            for count in (5, 100):  # the first to warm up
                job = to_job(Step(n=count, script="", starts_s=spread(count, 3)), port, CHAT_PATH, _HEADERS, _BODY)
                seen = observe(place, server, msgspec.structs.replace(job, stamps="offset", patience_s=30))
    found = metrics.failures(seen) | metrics.replay_errors(seen) | metrics.cost(seen)
    reason = why_not_counted(place, seen.outcome, _CLIENT_IN_TIME)
    return Trial(
        arm="lumos",
        workload=REPLAY,
        n=100,
        round=number,
        valid=not reason,
        reason=reason,
        metrics=found,
        in_pieces=metrics.in_pieces(seen, found),
        hist=metrics.histograms(seen),
    )
