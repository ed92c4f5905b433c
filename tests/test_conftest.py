"""The suite's own safety net: a deadlocked test fails at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent

DEADLOCKED_TESTS = """
import trio
from hypothesis import HealthCheck, given, settings, strategies as st

async def test_plain(autojump_clock):
    await trio.sleep_forever()

class TestInAClass:
    async def test_method(self, autojump_clock):
        await trio.Event().wait()

@settings(max_examples=1, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.just(1))
async def test_property(autojump_clock, number):
    await trio.sleep_forever()
"""


def test_deadlocked_tests_end_in_too_slow_error(tmp_path: Path) -> None:
    suite = tmp_path / "test_deadlocked.py"
    suite.write_text(DEADLOCKED_TESTS)
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-p", "no:cacheprovider", "--timeout=10"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(suite)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert "= 3 failed in " in result.stdout, result.stdout + result.stderr
    assert result.stdout.count("- TooSlowError()") == 3, result.stdout


async def test_an_async_test_has_one_virtual_day(autojump_clock: trio.testing.MockClock) -> None:
    assert trio.current_effective_deadline() == trio.current_time() + 86_400


@settings(max_examples=3)
@given(st.integers())
async def test_each_example_of_a_property_has_one_day(number: int) -> None:
    left = trio.current_effective_deadline() - trio.current_time()
    assert 86_000 < left <= 86_400
