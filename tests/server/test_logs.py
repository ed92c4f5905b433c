"""The log: one JSON line for each turn of a run and for each bug, without keys, prompts or answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import msgspec
import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from engine import Deadlines, ProviderError, Run, RunSupervisor, UsagePiece
from engine.pieces import AnsweredByPiece, FinishPiece
from server.logs import MAX_WAITING_CHARS, LogOutput, RunLogger
from tests.engine.scripted import FOREVER, SENT, Line, ScriptedProvider, spec_for, text
from tests.harness.pseudo_terminal import in_terminal

ROOT = Path(__file__).parents[2]
SECRET = "sk-secret-0123456789"

START = """
import logging, structlog
from server.logs import configure_logging
configure_logging(LEVEL)
logger = structlog.get_logger("lumos")
def charge(amount, api_key="sk-" + "secret-0123456789"):
    prompt = {"content": "my " + "prompt"}
    return amount / 0
"""
CRASH = """
try:
    charge(1)
except ZeroDivisionError as error:
    logger.error("request.crashed", exc_info=error)
"""
CRASH_OF_A_GROUP = """
try:
    try:
        charge(1)
    except ZeroDivisionError as error:
        raise ExceptionGroup("both", [error, KeyError("other")])
except ExceptionGroup as error:
    logger.error("run.crashed", exc_info=error)
"""
CRASH_IN_A_LIBRARY = """
try:
    charge(1)
except ZeroDivisionError:
    logging.getLogger("trio.serve_listeners").exception("accept returned %s", "EMFILE")
"""
ALL_LEVELS = """
for level in ("debug", "info", "warning", "error"):
    getattr(logger, level)("ours")
    getattr(logging.getLogger("library"), level)("theirs")
"""


def command(script: str, level: str = "info") -> list[str]:
    """A fresh interpreter that logs at that level."""
    return [sys.executable, "-c", START.replace("LEVEL", repr(level)) + script]


def logged(script: str, level: str = "info") -> list[dict[str, Any]]:
    """What the script logs when standard error is no terminal; every line must be JSON."""
    ended = subprocess.run(command(script, level), cwd=ROOT, capture_output=True, check=True, timeout=30)
    assert ended.stdout == b""
    return [msgspec.json.decode(line) for line in ended.stderr.splitlines()]


@pytest.mark.parametrize("script", [CRASH, CRASH_OF_A_GROUP, CRASH_IN_A_LIBRARY], ids=["ours", "group", "library"])
def test_a_traceback_tells_where_but_no_values(script: str) -> None:
    (line,) = logged(script)
    told = msgspec.json.encode(line).decode()
    assert line["level"] == "error"
    assert "ZeroDivisionError" in told
    assert '"name":"charge"' in told
    assert SECRET not in told
    assert "my prompt" not in told


def test_a_librarys_line_has_the_same_shape() -> None:
    (line,) = logged('logging.getLogger("hypercorn.error").warning("odd %s", "thing")')
    assert (line["event"], line["level"]) == ("odd thing", "warning")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [
        ("debug", ["debug", "info", "warning", "error"], ["warning", "error"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("warning", ["warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["error"]),
    ],
)
def test_the_level_is_for_our_lines_and_libraries_begin_at_warning(
    level: str, ours: list[str], theirs: list[str]
) -> None:
    lines = logged(ALL_LEVELS, level)
    assert [line["level"] for line in lines if line["event"] == "ours"] == ours
    assert [line["level"] for line in lines if line["event"] == "theirs"] == theirs


@pytest.mark.parametrize(("level", "heard"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_our_modules_lines_have_the_level_of_ours(level: str, heard: int) -> None:
    lines = logged(ALL_LEVELS.replace('"library"', '"server.mcp_process"'), level)
    assert len([line for line in lines if line["event"] == "theirs"]) == heard


def test_a_disk_that_is_full_stops_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        script = CRASH + CRASH_IN_A_LIBRARY + ALL_LEVELS + "print('still here')"
        ended = subprocess.run(command(script), cwd=ROOT, stdout=subprocess.PIPE, stderr=full, check=False, timeout=30)
    assert ended.stdout == b"still here\n"


FLOOD = """
for number in range(30_000):
    logger.info("run.ended", number=number)
print("still here", flush=True)
"""


def test_a_reader_that_does_not_read_stops_nothing_and_hears_how_much_it_missed() -> None:
    script = FLOOD + "input()"
    pipe = subprocess.PIPE
    with subprocess.Popen(command(script), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as logging:
        assert logging.stdout is not None
        assert logging.stdout.readline() == b"still here\n"
        _, told = logging.communicate(b"\n", timeout=30)
    lines = [msgspec.json.decode(line) for line in told.splitlines()]
    missing = [line["lines"] for line in lines if line["event"] == "log.dropped"]
    numbers = [line["number"] for line in lines if line["event"] == "run.ended"]
    assert sum(missing) + len(numbers) == 30_000
    assert len(missing) >= 1
    assert numbers == sorted(numbers)


def test_a_reader_that_does_not_read_does_not_hold_up_the_exit() -> None:
    with subprocess.Popen(command(FLOOD), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as logging:
        assert logging.wait(timeout=20) == 0


def test_lines_that_came_too_fast_are_counted_where_they_are_missing() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as told, open(writing, "wb") as log:
        output = LogOutput(log.fileno(), "{} dropped\n".format)
        for character in "abc":
            output.write(character * (MAX_WAITING_CHARS // 2 - 1) + "\n")
        assert not output.wait_written(0.01)
        assert [told.readline()[:3] for _ in range(3)] == [b"aaa", b"bbb", b"1 d"]


def test_what_is_refused_is_counted_until_it_can_be_told() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, TemporaryFile() as disk:
        output = LogOutput(full.fileno(), "{} dropped\n".format)
        output.write("refused\n")
        assert output.wait_written()
        os.dup2(disk.fileno(), full.fileno())  # there is room again
        output.write("line\n")
        assert output.wait_written()
        disk.seek(0)
        assert disk.read() == b"line\n1 dropped\n"


def test_in_a_terminal_a_line_is_text_and_a_traceback_has_no_values() -> None:
    with in_terminal(
        command(CRASH + 'logger.info("run.started", run_id="abc")'), {"PYTHONPATH": str(ROOT)}
    ) as keyboard:
        assert keyboard.wait_end() == 0
    assert "ZeroDivisionError: division by zero" in keyboard.shown
    assert "run.started" in keyboard.shown
    assert '"event"' not in keyboard.shown
    assert SECRET not in keyboard.shown
    assert "my prompt" not in keyboard.shown


ODD_VALUES = """
logger.info("odd", half="\\ud83d", huge=1 << 70, thing=logging, keys={1: 2}, text="\u00e9\u2028")
logger.exception("not caught")
structlog.contextvars.bind_contextvars(worker="w1")
logger.debug("not heard")
logger.warning("bound")
"""


def test_what_json_cannot_say_is_described() -> None:
    ended = subprocess.run(command(ODD_VALUES), cwd=ROOT, capture_output=True, check=True, timeout=30)
    odd, exception, bound = map(json.loads, ended.stderr.splitlines())  # msgspec reads no half an emoji
    assert (odd["huge"], odd["keys"], odd["text"]) == (1 << 70, {"1": 2}, "\u00e9\u2028")
    assert odd["half"] == "\ud83d"
    assert odd["thing"].startswith("<module 'logging'")
    assert (exception["level"], bound["level"], bound["worker"]) == ("error", "warning", "w1")
    assert all(len(line["timestamp"]) in (20, 27) and line["timestamp"].endswith("Z") for line in (odd, bound))


# The turns of a run


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """What is logged while the test runs."""
    with structlog.testing.capture_logs() as captured:
        yield captured


async def run_to_its_end(*script: Line, **limits: Any) -> Run:
    """A run of a supervisor that logs, in virtual time."""
    async with trio.open_nursery() as nursery:
        supervisor = RunSupervisor(nursery, RunLogger())
        return supervisor.start(spec_for(ScriptedProvider(*script), **limits))  # noqa: ASYNC121 - once it has ended


async def test_each_turn_of_a_run_is_a_line(autojump_clock: MockClock, lines: list[Any]) -> None:
    end = (FinishPiece("stop"), UsagePiece(7, 2))
    run = await run_to_its_end((0, (SENT,)), (1.5, text("hello")), (2.25, end), resume_grace=FOREVER)
    assert lines == [
        {
            "event": "run.started",
            "log_level": "info",
            "run_id": run.id,
            "agent_id": "agent",
            "provider": "scripted",
            "model": "model",
        },
        {"event": "run.first_token", "log_level": "info", "run_id": run.id, "ttfb_ms": 1500.0},
        {
            "event": "run.ended",
            "log_level": "info",
            "run_id": run.id,
            "agent_id": "agent",
            "reason": "done",
            "elapsed_ms": 2250.0,
            "tokens": 2,
            "tokens_estimated": False,
        },
    ]


@pytest.mark.parametrize(
    ("script", "limits", "reason", "tokens", "estimated"),
    [
        ([(1, ProviderError("upstream.rate_limit", "slow down"))], {}, "error:upstream.rate_limit", 0, False),
        ([(1, text("12345678")), (FOREVER, ())], {"deadlines": Deadlines(total=3)}, "error:timeout.total", 2, True),
        ([(1, text("12345678")), (FOREVER, ())], {"resume_grace": 0}, "stop:disconnect", 2, True),
        ([(1, ZeroDivisionError("a bug"))], {}, "error:internal", 0, True),
    ],
)
async def test_how_a_run_ended_is_told(
    script: list[Line],
    limits: dict[str, Any],
    reason: str,
    tokens: int,
    estimated: bool,
    autojump_clock: MockClock,
    lines: list[Any],
) -> None:
    await run_to_its_end((0, (SENT,)), *script, **limits)
    ended = lines[-1]
    assert (ended["event"], ended["reason"], ended["tokens"]) == ("run.ended", reason, tokens)
    assert ended["tokens_estimated"] is estimated


async def test_a_crash_is_a_line_with_the_bug(autojump_clock: MockClock, lines: list[Any]) -> None:
    run = await run_to_its_end((1, ZeroDivisionError("a bug")))
    (crash,) = [line for line in lines if line["event"] == "run.crashed"]
    assert (crash["log_level"], crash["run_id"]) == ("error", run.id)
    assert "a bug" in repr(crash["exc_info"].exceptions)


async def test_a_failed_run_is_a_warning_that_says_why(autojump_clock: MockClock, lines: list[Any]) -> None:
    refused = ProviderError("upstream.auth", "the model's server refused the key")
    await run_to_its_end((0, refused), resume_grace=FOREVER)
    ended = lines[-1]
    assert (ended["event"], ended["log_level"], ended["reason"]) == ("run.ended", "warning", "error:upstream.auth")
    assert ended["error"] == "the model's server refused the key"


async def test_who_of_several_providers_answered_is_said(autojump_clock: MockClock, lines: list[Any]) -> None:
    end = (FinishPiece("stop"), UsagePiece(7, 2))
    await run_to_its_end((0, (AnsweredByPiece("second", "m2"),)), (1, text("hello")), (2, end), resume_grace=FOREVER)
    assert (lines[-1]["provider"], lines[-1]["model"]) == ("second", "m2")
