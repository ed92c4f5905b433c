"""The TTFB benchmark: its table from known numbers, and a short form of it against a real server."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.ttfb import WAYS, Environment, Result, Trial, main, markdown, play_round, summarize
from engine import BasicAgent, Emit, FinishPiece, ModelRequest, TextPiece
from providers.http import open_client
from providers.recording import RecordedFailure, Recording, load
from providers.replay import ReplayProvider
from tests.harness.background import served_agents
from tests.harness.recordings import steady_recording

STREAMING, WHOLE, SIMULATED = WAYS


def test_the_table() -> None:
    trials = [
        Trial(0, STREAMING, ttfe_ms=500, total_ms=4000),
        Trial(0, WHOLE, ttfe_ms=4000, total_ms=4000),
        Trial(0, SIMULATED, ttfe_ms=4004, total_ms=4008),
        Trial(1, STREAMING, ttfe_ms=300, total_ms=4000),
        Trial(1, WHOLE, ttfe_ms=4000, total_ms=4000),
        Trial(1, SIMULATED, ttfe_ms=3996, total_ms=4000),
    ]
    environment = Environment("abc1234", "Some CPU", 2, "6.18", "3.11.7", {"trio": "0.35.0", "httpx": "0.28.1"})
    result = Result(env=environment, agent="demo", rounds=2, at_once=False, trials=trials, summary=summarize(trials))
    assert markdown(result) == (
        "| | TTFB (first content) | total | TTFB to streaming's |\n"
        "|---|--:|--:|--:|\n"
        "| streaming | 0.400 s | 4.000 s | 1.00 |\n"
        "| whole answer | 4.000 s | 4.000 s | 10.00 |\n"
        "| simulated streaming | 4.000 s | 4.004 s | 10.00 |\n"
        "\n"
        "The same answer, replayed by `demo`; medians of 2 interleaved rounds, one after the other,"
        " each on a new loopback connection.\n"
        "Some CPU (2 CPUs), Linux 6.18, Python 3.11.7, trio 0.35.0, httpx 0.28.1; commit abc1234."
    )


def test_streaming_is_seen_long_before_what_waits() -> None:
    options = ["--recording", "gpt4o-short", "--rounds", "1", "--at-once", "--json"]
    run = CliRunner().invoke(main, options, catch_exceptions=False)
    result = msgspec.json.decode(run.stdout, type=Result)
    streaming, whole, simulated = result.summary
    assert (streaming.way, whole.way, simulated.way) == tuple(WAYS)
    assert streaming.ttfe_ms < 0.6 * whole.ttfe_ms
    assert simulated.ttfe_ms >= 0.9 * whole.ttfe_ms
    recorded_ms = load("gpt4o-short").duration_ns / 1e6
    for line in result.summary:
        assert recorded_ms - 10 < line.total_ms < recorded_ms + 1000
    assert len(result.trials) == 3
    assert result.env.versions.keys() >= {"trio", "hypercorn", "quart-trio", "httpx"}


QUICK = steady_recording(first=0.02, gap=0.02, last=0.06)


def replaying(recording: Recording) -> BasicAgent:
    return BasicAgent(agent_id="a", provider=ReplayProvider(recording), model="")


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (0, [STREAMING, WHOLE, SIMULATED]),
        (1, [WHOLE, SIMULATED, STREAMING]),
        (2, [SIMULATED, STREAMING, WHOLE]),
        (3, [STREAMING, WHOLE, SIMULATED]),
    ],
)
async def test_each_round_has_another_order(number: int, order: list[str]) -> None:
    with served_agents({"a": replaying(QUICK)}) as url:
        trials = await play_round(url, "a", number, at_once=False)
    assert [trial.way for trial in trials] == order


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_that_failed_is_no_figure(way: str) -> None:
    failure = RecordedFailure(0, "upstream.overloaded", "too busy")
    failing = Recording(msgspec.structs.replace(QUICK.header, failure=failure), ())
    with served_agents({"a": replaying(failing)}) as url:
        async with open_client() as client:
            with pytest.raises(RuntimeError, match="a did not answer"):
                await WAYS[way](client, url, "a")


class EveryAnswerAnother:
    """A provider that never says the same twice."""

    name = "another"

    def __init__(self) -> None:
        self._answers = itertools.count()

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        emit((TextPiece(f"answer {next(self._answers)}"), FinishPiece("stop")))

    async def aclose(self) -> None:
        """Nothing to close."""


async def test_answers_that_differ_cannot_be_compared() -> None:
    agent = BasicAgent(agent_id="a", provider=EveryAnswerAnother(), model="")
    with served_agents({"a": agent}) as url, pytest.raises(RuntimeError, match="the answers differ"):
        await play_round(url, "a", 0, at_once=False)
