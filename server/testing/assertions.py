"""Assertions about a run and a world, each of which says what there was instead. Times in virtual seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
import trio
from trio.testing import wait_all_tasks_blocked

from engine import AgentStopped, Error, Event, GenerationComplete

from .chat import ChatRun, SeenToolCall
from .lumos import VirtualLumos

LONGEST_SHOWN = 60
"""Of a text in a line of a message; the rest is cut."""

_ANY: Any = object()


def assert_ttfb(run: ChatRun, seconds: float, *, tolerance: float = 0.0) -> None:
    """The first content (text, reasoning or a tool call) came then."""
    __tracebackhide__ = True
    _check_time(run, "the first content came", run.ttfb, seconds, tolerance)


def assert_ttft(run: ChatRun, seconds: float, *, tolerance: float = 0.0) -> None:
    """The first text of the answer came then."""
    __tracebackhide__ = True
    _check_time(run, "the first text came", run.ttft, seconds, tolerance)


def assert_text(run: ChatRun, text: str) -> None:
    """That is the text that came, whole or as far as the run went."""
    __tracebackhide__ = True
    if run.text != text:
        same = next((at for at, (a, b) in enumerate(zip(run.text, text, strict=False)) if a != b), None)
        at = min(len(run.text), len(text)) if same is None else same
        there, wanted = _short(run.text[at:]) or "it ends", _short(text[at:]) or "the end"
        _fail(run, f"the text differs from character {at} on: {there}, not {wanted}")


def assert_done(run: ChatRun, text: str | None = None, *, at: float | None = None, tolerance: float = 0.0) -> None:
    """The run came to its end (with that text, at that time)."""
    __tracebackhide__ = True
    _check_end(run, GenerationComplete, "did not come to its end", at, tolerance)
    if text is not None:
        assert_text(run, text)


def assert_error(run: ChatRun, code: str, *, at: float | None = None, tolerance: float = 0.0) -> None:
    """The run ended in an ``error`` event of that code (at that time)."""
    __tracebackhide__ = True
    end = run.terminal
    if isinstance(end, Error) and end.code != code:
        _fail(run, f"the run failed with {end.code!r} ({end.content}), not with {code!r}")
    _check_end(run, Error, f"did not fail with {code!r}", at, tolerance)


def assert_stopped(run: ChatRun, *, at: float | None = None, tolerance: float = 0.0) -> None:
    """The run was stopped (at that time)."""
    __tracebackhide__ = True
    _check_end(run, AgentStopped, "was not stopped", at, tolerance)


def assert_tool_called(
    run: ChatRun,
    name: str,
    *,
    arguments: Mapping[str, Any] | str | None = None,
    result: Any = _ANY,
    failed: bool | None = None,
) -> SeenToolCall:
    """The model called the tool (with these arguments, and that result); returns the first such call."""
    __tracebackhide__ = True

    def fits(call: SeenToolCall) -> bool:
        return (
            call.name == name
            and (arguments is None or call.arguments == arguments)
            and (result is _ANY or call.result == result)
            and (failed is None or call.status == ("Error" if failed else "Success"))
        )

    found = next(filter(fits, run.tool_calls), None)
    if found is None:
        seen = "; ".join(
            f"{call.name}({call.arguments!r}) -> {call.status or 'no result'} {_short(call.result)}"
            for call in run.tool_calls
        )
        _fail(run, f"there was no such call of {name!r}; there were: {seen or 'none'}")
    return found


def assert_events(run: ChatRun, *expected: type[Event] | tuple[float, type[Event]] | Event) -> None:
    """These events came, in this order: each a kind, a time and a kind, or a whole event. Others may come between."""
    __tracebackhide__ = True
    there = iter(run.timed_events)
    for number, wanted in enumerate(expected, 1):
        if not any(_is(wanted, at, event) for at, event in there):
            _fail(run, f"number {number} of the expected events did not come (after those before it): {_named(wanted)}")


async def assert_nothing_left(lumos: VirtualLumos, *, within: float = 0.0) -> None:
    """No run, none of its tasks and no request to a model is under way, at the latest ``within`` seconds from now.

    A run whose reader has left goes on for its grace (5 s, ``on_disconnect``).
    """
    __tracebackhide__ = True
    await wait_all_tasks_blocked()
    if within and _left(lumos):
        await trio.sleep(within)
        await wait_all_tasks_blocked()
    left = _left(lumos)
    if left:
        raise AssertionError("\n  ".join([f"at {trio.current_time():g} s there is still", *left]))


def _left(lumos: VirtualLumos) -> list[str]:
    left = [f"{lumos.active_runs()} run(s) under way"] if lumos.active_runs() else []
    left += [f"the task {name!r}" for name in _tasks_of_runs(trio.lowlevel.current_root_task())]
    for model in lumos.models.values():
        for call in model.calls:
            if call.under_way:
                left.append(f"a request to the model at {model.url}, made at {call.asked_at:g} s")
    return left


def _tasks_of_runs(task: trio.lowlevel.Task | None) -> list[str]:
    if task is None:
        return []
    own = [task.name] if task.name.startswith("run ") else []
    children = (child for nursery in task.child_nurseries for child in nursery.child_tasks)
    return own + [name for child in children for name in _tasks_of_runs(child)]


def _check_time(run: ChatRun, what: str, there: float | None, wanted: float, tolerance: float) -> None:
    __tracebackhide__ = True
    if there is None:
        _fail(run, f"{what} never, not at {wanted:g} s")
    if abs(round(there * 1e9) - round(wanted * 1e9)) > round(tolerance * 1e9):
        _fail(run, f"{what} at {there:.9g} s, not at {wanted:.9g} s{f' ± {tolerance:g}' if tolerance else ''}")


def _check_end(run: ChatRun, kind: type[Event], otherwise: str, at: float | None, tolerance: float) -> None:
    __tracebackhide__ = True
    if not isinstance(run.terminal, kind):
        _fail(run, f"the run {otherwise}")
    if at is not None:
        _check_time(run, "the end came", run.arrivals[-1], at, tolerance)


def _is(wanted: type[Event] | tuple[float, type[Event]] | Event, at: float, event: Event) -> bool:
    match wanted:
        case (float() | int() as time, kind):
            return round(time * 1e9) == round(at * 1e9) and isinstance(event, kind)
        case type():
            return isinstance(event, wanted)
    return bool(event == wanted)


def _named(wanted: Any) -> str:
    match wanted:
        case (time, kind):
            return f"{kind.__name__} at {time:g} s"
        case type():
            return wanted.__name__
    return repr(wanted)


def _fail(run: ChatRun, message: str) -> NoReturn:
    __tracebackhide__ = True
    raise AssertionError("\n".join([message, "what the client saw:", *(f"  {line}" for line in _story(run))]))


def _story(run: ChatRun) -> list[str]:
    """What came when, one line for each event, without the middle of a long run."""
    lines = [] if run.status_code is None else [f"HTTP {run.status_code}"]
    if run.refusal is not None:
        lines.append(_short(run.refusal, 400))
    events = [f"{at:10.6f}  {msgspec.json.encode(event).decode()[:160]}" for at, event in run.timed_events]
    if len(events) > 12:
        events[6:-6] = [f"            … {len(events) - 12} more …"]
    lines += events
    if run.broken is not None:
        lines.append(f"{run.elapsed:10.6f}  the connection broke: {run.broken}")
    return lines or ["nothing"]


def _short(what: Any, longest: int = LONGEST_SHOWN) -> str:
    text = "" if what is None or what == "" else repr(what)
    return text if len(text) <= longest else f"{text[:longest]}…"
