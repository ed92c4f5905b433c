"""The plugin in a user's suite: pytest-trio and anyio beside each other, and what a session without it pays."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.harness.pytest_session import BOTH, run_pytest

ROOT = Path(__file__).parents[3]

MARKED = """
import pytest
import trio
from server.testing import assert_done, assert_ttfb

pytestmark = pytest.mark.trio

@pytest.fixture
async def told(virtual_lumos, replay):
    await trio.sleep(1)
    virtual_lumos.add_agent("helper", replay.text("Hello", first=3))
    yield "told"
    assert trio.current_time() == 4

async def test_passes(told, virtual_lumos):
    assert_done(await virtual_lumos.chat("helper"), "Hello", at=3)

async def test_with_a_clock(virtual_lumos, replay, autojump_clock):
    virtual_lumos.add_agent("helper", replay.text("Hello", first=3))
    await virtual_lumos.chat("helper")
    assert autojump_clock.current_time() == 3

async def test_fails(virtual_lumos, replay):
    virtual_lumos.add_agent("helper", replay.text("Hello", first=3))
    assert_ttfb(await virtual_lumos.chat("helper"), 2.5)

async def test_stuck(virtual_lumos):
    await trio.sleep_forever()

async def test_skipped(virtual_lumos):
    pytest.skip("not now")

async def test_other_clock():
    assert not isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
"""

SYNC = """
def test_sync(virtual_lumos, replay):
    virtual_lumos.add_agent("helper", replay.text("Hello"))
"""

ANYIO = """
import anyio
import pytest
from server.testing import assert_done

pytestmark = pytest.mark.anyio

@pytest.fixture
async def told(virtual_lumos, replay):
    await anyio.sleep(1)
    virtual_lumos.add_agent("helper", replay.text("Hello", first=3))
    yield "told"

async def test_passes(told, virtual_lumos):
    assert anyio.current_time() == 1
    assert_done(await virtual_lumos.chat("helper"), "Hello", at=3)

async def test_again(virtual_lumos, replay):
    assert anyio.current_time() == 0
    virtual_lumos.add_agent("helper", replay.text("Hello", first=3))
    async with virtual_lumos.open_chat("helper") as run:
        await run.read(events=1)

async def test_fails(virtual_lumos, replay):
    virtual_lumos.add_agent("helper", replay.text("Hello", first=3))
    assert_done(await virtual_lumos.chat("helper"), "Bye")

async def test_stuck(virtual_lumos):
    await anyio.sleep_forever()
"""

UNCONFIGURED = """
import pytest

@pytest.mark.anyio
async def test_clock(virtual_lumos):
    pass
"""

NEEDLESS = """
import sys

def test_nothing_is_loaded():
    heavy = {"trio", "quart", "httpx", "msgspec", "sqlalchemy", "engine", "providers"}
    assert not heavy & sys.modules.keys()
"""


def test_both_plugins_in_one_suite(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_marked.py").write_text(MARKED)
    (tmp_path / "test_sync.py").write_text(SYNC)
    for name in ("ready", "unready"):
        (tmp_path / name).mkdir()
    (tmp_path / "ready" / "conftest.py").write_text("from server.testing.for_anyio import anyio_backend\n")
    (tmp_path / "ready" / "test_anyio.py").write_text(ANYIO)
    (tmp_path / "unready" / "test_unready.py").write_text(UNCONFIGURED)
    said = run_pytest(tmp_path, *BOTH, "-v", "--tb=short")
    outcomes = dict(re.findall(r"^(\S+::\S+) (PASSED|FAILED|SKIPPED|ERROR)", said, re.MULTILINE))
    assert outcomes == {
        "test_marked.py::test_passes": "PASSED",
        "test_marked.py::test_with_a_clock": "PASSED",
        "test_marked.py::test_fails": "FAILED",
        "test_marked.py::test_stuck": "FAILED",
        "test_marked.py::test_skipped": "SKIPPED",
        "test_marked.py::test_other_clock": "PASSED",
        "test_sync.py::test_sync": "PASSED",
        "ready/test_anyio.py::test_passes": "PASSED",
        "ready/test_anyio.py::test_again": "PASSED",
        "ready/test_anyio.py::test_fails": "FAILED",
        "ready/test_anyio.py::test_stuck": "FAILED",
        "unready/test_unready.py::test_clock[asyncio]": "FAILED",
        "unready/test_unready.py::test_clock[trio]": "FAILED",
    }, said
    assert "the first content came at 3 s, not at 2.5 s" in said
    assert "the text differs from character 0 on: 'Hello', not 'Bye'" in said
    assert said.count("a virtual day has passed") >= 2
    assert "virtual_lumos runs on trio, and this test does not" in said
    assert "virtual_lumos needs a clock that jumps" in said


def test_a_session_that_does_not_use_it_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_needless.py").write_text(NEEDLESS)
    said = run_pytest(tmp_path)
    assert "1 passed" in said, said


def test_the_server_never_loads_what_tests_use() -> None:
    script = """
import sys
import server.cli, server.compose, server.workers
ours = ("server.testing", "server.simulation", "pytest", "_pytest")
print([name for name in sys.modules if name.startswith(ours)])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_nothing_else_imports_it_not_even_later() -> None:
    """``lumos simulate`` alone may load the simulation, when it is called."""
    importing = re.compile(r"^\s*(?:from|import) (?:server)?\.?(testing|simulation)\b", re.MULTILINE)
    found = {
        (path.name, match[1])
        for folder in ("engine", "providers", "server")
        for path in (ROOT / folder).rglob("*.py")
        for match in importing.finditer(path.read_text())
        if not {"testing", "simulation"}.intersection(path.parts)
    }
    assert {name for name, what in found if what == "testing" or not name.startswith(("cli", "simulate"))} == set()
