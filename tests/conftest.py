"""What holds for every test: a deadlock fails the test instead of hanging the suite.

Under ``autojump_clock`` a deadlocked test never ends: with no deadline anywhere, the clock has nothing to jump to. So
every async test's body runs inside a virtual day. A deadlock then jumps to its end and fails with ``TooSlowError``,
at once in real time. On the real clock, and in the setup and teardown of fixtures, pytest-timeout is what ends a hang.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import pytest
import trio

VIRTUAL_DAY_SECONDS = 86_400


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
