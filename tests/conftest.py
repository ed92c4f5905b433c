"""What holds for every test: a deadlock fails the test instead of hanging the suite.

Under ``autojump_clock`` a deadlocked test never ends: with no deadline anywhere, the clock has nothing to jump to. So
every async test's body runs inside a virtual day. A deadlock then jumps to its end and fails with ``TooSlowError``,
at once in real time. On the real clock, and in the setup and teardown of fixtures, pytest-timeout is what ends a hang.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import trio

VIRTUAL_DAY_SECONDS = 86_400

TESTS = Path(__file__).parent

OF_PROCESSES = (
    "benchmarks/test_bench_run.py",
    "benchmarks/test_cancels.py",
    "benchmarks/test_slow_readers.py",
    "benchmarks/test_ttfb.py",
    "browser/",
    "providers/test_cancel_real_sockets.py",
    "server/store/test_killed.py",
    "server/store/test_processes.py",
    "server/test_compose.py",
    "server/test_drain.py",
    "server/test_killed_server.py",
    "server/test_nginx.py",
    "server/test_serve_otel.py",
    "server/test_start_modules.py",
    "server/test_two_workers.py",
    "server/test_vendor_session.py",
    "server/test_workers.py",
    "test_conftest.py",
    "test_deploy.py",
)
"""Tests of other processes, or of what takes real time: coverage sees nothing of the one, and doubles the other."""

OVER_ALL = (
    "benchmarks/test_bench_arms.py",
    "server/simulation/test_seeds.py",
    "server/test_schemathesis.py",
    "server/test_tenants.py",
)
"""Tests that go over everything once more, and are long: no line is covered by them alone."""

UNMEASURED = (*OF_PROCESSES, *OVER_ALL)
"""``make check`` measures coverage without these; ``make test`` runs all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these modules."""
    for item in items:
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).as_posix().startswith(UNMEASURED):
            item.add_marker("unmeasured")


def within_a_virtual_day(test: Callable[..., Any]) -> Callable[..., Any]:
    """Give an async test function the deadline; leave any other function alone."""
    if not inspect.iscoroutinefunction(test):
        return test
    body: Callable[..., Awaitable[None]] = test

    @functools.wraps(test)
    async def limited(*args: Any, **kwargs: Any) -> None:
        with trio.fail_after(VIRTUAL_DAY_SECONDS):
            await body(*args, **kwargs)

    return limited


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Wrap the test before pytest-trio, whose hook of the same name turns it into a synchronous one."""
    if isinstance(item, pytest.Function):
        hypothesis_handle = getattr(item.obj, "hypothesis", None)
        if hypothesis_handle is None:
            item.obj = within_a_virtual_day(item.obj)
        else:
            hypothesis_handle.inner_test = within_a_virtual_day(hypothesis_handle.inner_test)
    return (yield)
