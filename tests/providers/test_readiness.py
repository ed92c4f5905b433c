"""One reads for all who wait, in trio's loop or in a task, or each for itself: on real sockets."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from providers.readiness import (
    Call,
    Readiness,
    _runner_of_trio,
    caller_from_threads,
    share_readiness,
    shared_readiness,
)
from providers.tcp import Take, TcpStream

from .sharing import Pair, Taker, connected, reset, sharing

Reading = Callable[[], AbstractAsyncContextManager[trio.Nursery]]


pair = pytest.fixture(connected, name="pair")
another_pair = pytest.fixture(connected, name="another_pair")


@asynccontextmanager
async def shared() -> AsyncIterator[trio.Nursery]:
    """A nursery for who reads; trio's loop tells them."""
    async with sharing(), trio.open_nursery() as reading:
        yield reading


@asynccontextmanager
async def by_a_task() -> AsyncIterator[trio.Nursery]:
    """A nursery for who reads; a task tells them, as trio's loop cannot."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("providers.readiness._runner_of_trio", lambda: None)
        async with shared() as reading:
            yield reading


@asynccontextmanager
async def alone() -> AsyncIterator[trio.Nursery]:
    """A nursery for who reads."""
    async with trio.open_nursery() as reading:
        yield reading


def there() -> Readiness:
    """What is shared now."""
    readiness = shared_readiness()
    assert readiness is not None
    return readiness


SHARED = pytest.mark.parametrize("reading", [shared, by_a_task])
ALL = pytest.mark.parametrize("reading", [shared, by_a_task, alone])


@ALL
async def test_it_is_handed_on_until_there_is_enough(pair: Pair, reading: Reading) -> None:
    stream, far = pair
    taker = Taker(2)
    async with reading() as nursery:
        nursery.start_soon(stream.read_into, taker.take)
        for data in (b"a", b"b", b"c"):
            await wait_all_tasks_blocked()
            far.sendall(data)
        with trio.fail_after(5):
            assert await stream.receive_some() == b"c"
    assert taker.taken == [b"a", b"b"]


@ALL
async def test_the_end_is_handed_on_once(pair: Pair, reading: Reading) -> None:
    stream, far = pair
    taker = Taker()
    far.sendall(b"last")
    far.close()
    async with reading():
        await stream.read_into(taker.take)
    assert taker.taken == [b"last", b""]


@ALL
async def test_a_reset_is_a_broken_stream(pair: Pair, reading: Reading) -> None:
    stream, far = pair
    reset(far)
    async with reading():
        with pytest.raises(trio.BrokenResourceError) as broken:
            await stream.read_into(Taker().take)
        assert isinstance(broken.value.__cause__, ConnectionResetError)


@ALL
async def test_closing_ends_the_wait_and_refuses_the_next(pair: Pair, reading: Reading) -> None:
    stream, _ = pair
    taker = Taker()

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.read_into(taker.take)

    async with reading() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await stream.aclose()
        await wait_all_tasks_blocked()
        await read()
    assert taker.taken == []


@ALL
async def test_who_is_cancelled_takes_nothing(pair: Pair, reading: Reading) -> None:
    stream, far = pair
    taker = Taker()
    async with reading():
        for seconds in (0, 0.01):
            with trio.move_on_after(seconds) as scope:
                await stream.read_into(taker.take)
            assert scope.cancelled_caught
        far.sendall(b"kept")
        with trio.fail_after(5):
            assert await stream.receive_some() == b"kept"
    assert taker.taken == []


async def fail_beside_another(
    nursery: trio.Nursery, failure: type[Exception], take: Take, pair: Pair, another_pair: Pair
) -> None:
    """That is raised to who reads the one pair, and who reads the other goes on."""

    async def read() -> None:
        with pytest.raises(failure):
            await pair[0].read_into(take)
        failed.set()

    failed, read_on, taker = trio.Event(), trio.Event(), Taker(1)

    async def read_another() -> None:
        await another_pair[0].read_into(taker.take)
        read_on.set()

    nursery.start_soon(read)
    nursery.start_soon(read_another)
    await wait_all_tasks_blocked()
    pair[1].sendall(b"a")
    with trio.fail_after(5):
        await failed.wait()
        another_pair[1].sendall(b"b")
        await read_on.wait()
    assert taker.taken == [b"b"]


@ALL
async def test_what_taking_raises_is_raised_there_alone(pair: Pair, another_pair: Pair, reading: Reading) -> None:
    def refuse(data: bytes) -> bool:
        raise LookupError(data)

    async with reading() as nursery:
        await fail_beside_another(nursery, LookupError, refuse, pair, another_pair)


@ALL
@pytest.mark.parametrize("raises", [True, False])
async def test_who_is_cancelled_while_taking_loses_no_error(pair: Pair, reading: Reading, *, raises: bool) -> None:
    stream, far = pair
    scope = trio.CancelScope()

    def take(_: bytes) -> bool:
        scope.cancel()
        if raises:
            raise LookupError("lost?")
        return True

    async with reading():
        far.sendall(b"a")
        if raises:
            with pytest.raises(LookupError), scope:
                await stream.read_into(take)
        else:
            with trio.fail_after(5), scope:
                await stream.read_into(take)
            assert scope.cancelled_caught
        far.sendall(b"b")
        assert await stream.receive_some() == b"b"


@SHARED
async def test_one_reads_for_all(pair: Pair, another_pair: Pair, reading: Reading) -> None:
    takers = Taker(3), Taker(3)
    async with reading() as nursery:
        for (stream, _), taker in zip((pair, another_pair), takers, strict=True):
            nursery.start_soon(stream.read_into, taker.take)
        for _ in range(3):
            await wait_all_tasks_blocked()
            for _, far in (pair, another_pair):
                far.sendall(b"x")
    assert takers[0].taken == takers[1].taken == [b"x"] * 3
    (reader,) = {*takers[0].in_tasks, *takers[1].in_tasks}
    name = None if reader is None else reader.name
    assert name == (None if reading is shared else "providers.readiness.Readiness.run")


@SHARED
async def test_each_is_told_once_before_others_have_their_turn(reading: Reading) -> None:
    """Over pairs that have at once what is written to them; nobody reads it."""
    told: list[str] = []
    first, first_peer = socket.socketpair()
    second, second_peer = socket.socketpair()

    def on_first() -> None:
        told.append("first")
        if len(told) == 1:
            second_peer.send(b"x")
            nursery.start_soon(note_turn)
        elif len(told) > 100:  # a loop without an end would be a test without one
            forget_both()

    async def note_turn() -> None:
        told.append("others")
        forget_both()

    def forget_both() -> None:
        there().forget(first.fileno())
        there().forget(second.fileno())

    with first, first_peer, second, second_peer:
        async with reading() as nursery:
            readiness = there()
            readiness.watch(first.fileno(), on_first)
            readiness.watch(second.fileno(), partial(told.append, "second"))
            first_peer.send(b"x")
            await wait_all_tasks_blocked()
    assert told[0] == "first"
    assert told.index("others") <= (1 if reading is shared else 3), "right after this turn, or after the task's next"


@SHARED
async def test_a_bug_of_who_is_told_ends_it_and_is_raised(pair: Pair, reading: Reading) -> None:
    def fail() -> None:
        told.append("once")
        raise ZeroDivisionError

    async def wait() -> None:
        async with reading():
            there().watch(pair[0]._socket.fileno(), fail)
            pair[1].sendall(b"x")
            with trio.fail_after(5):
                await trio.sleep_forever()

    told: list[str] = []
    with pytest.raises(ExceptionGroup) as raised:
        await wait()
    assert raised.group_contains(ZeroDivisionError)
    assert told == ["once"]


async def test_a_bug_while_it_is_cancelled_is_logged(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with share_readiness() as readiness:
        assert readiness is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.run)
            await wait_all_tasks_blocked()
            readiness.watch(pair[0]._socket.fileno(), fail)
            pair[1].sendall(b"x")
            nursery.cancel_scope.cancel()
            trio.lowlevel.current_task()._runner.io_manager.get_events(0)
    assert readiness.ended
    assert {record.exc_info and record.exc_info[0] for record in caplog.records} == {ZeroDivisionError}


@pytest.mark.parametrize("strange", ["runq", "deadlines", "io_manager", "is_guest"])
async def test_another_trio_is_left_alone(monkeypatch: pytest.MonkeyPatch, strange: str) -> None:
    """One that we do not know, or that waits in a thread of its own (as a guest)."""
    runner = trio.lowlevel.current_task()._runner
    assert _runner_of_trio() is runner, "trio's loop is another one now, and each token wakes a task again"
    known = {name: getattr(runner, name) for name in ("runq", "deadlines", "io_manager", "is_guest")}
    del known[strange]
    for other in (SimpleNamespace(**known), SimpleNamespace(**known | {"is_guest": True}), None):
        monkeypatch.setattr(trio.lowlevel, "current_task", lambda other=other: SimpleNamespace(_runner=other))
        assert _runner_of_trio() is None


async def test_it_leaves_trio_as_it_was() -> None:
    """Trio waits with its own again, and nothing of it stays in its set."""
    runner = _runner_of_trio()
    assert runner is not None
    theirs = runner.io_manager
    with share_readiness() as readiness:
        assert readiness is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.run)
            await wait_all_tasks_blocked()
            assert runner.io_manager is not theirs
            nursery.cancel_scope.cancel()
        assert runner.io_manager is theirs
        with pytest.raises(FileNotFoundError):
            readiness._epoll.modify(theirs._epoll, select.EPOLLIN)


class Passes(trio.abc.Instrument):
    """Counts those of trio's loop."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@contextmanager
def written_meanwhile(far: socket.socket) -> Iterator[None]:
    """A thread writes bytes, most of which find trio waiting again, to the block's end."""
    enough = threading.Event()

    def write() -> None:
        while not enough.wait(0.002):
            far.sendall(b"x")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


async def test_a_token_is_no_pass_of_trios_loop(pair: Pair) -> None:
    stream, far = pair
    passes, taker = Passes(), Taker(20)
    async with shared():
        with written_meanwhile(far), trio.fail_after(5):
            trio.lowlevel.add_instrument(passes)
            await stream.read_into(taker.take)
            trio.lowlevel.remove_instrument(passes)
    assert passes.count <= 4, f"{len(taker.taken)} reads"


@ALL
async def test_what_a_token_makes_due_is_not_kept_waiting(pair: Pair, reading: Reading) -> None:
    """A task that it wakes, and a deadline that it moves forward, are seen to at once, while nothing else comes."""
    stream, far = pair
    woken, scope = trio.Event(), trio.CancelScope()

    def take(data: bytes) -> bool:
        if data == b"1":
            woken.set()
        else:
            scope.deadline = trio.current_time() + 0.01
        return True

    async with reading() as nursery:
        nursery.start_soon(stream.read_into, take)
        await wait_all_tasks_blocked()
        with trio.fail_after(5):
            far.sendall(b"1")
            await woken.wait()
            with scope:
                far.sendall(b"2")
                await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    assert scope.cancelled_caught


@ALL
async def test_tokens_without_end_keep_nobody_waiting(pair: Pair, reading: Reading) -> None:
    """Neither a thread's result, nor a deadline, nor who waits until all are idle, nor a socket of a task."""
    stream, far = pair
    near_end, far_end = trio.socket.socketpair()

    def take_and_send(_: bytes) -> bool:
        far.send(b"x")
        return True

    with near_end, far_end:
        async with reading() as nursery:
            nursery.start_soon(stream.read_into, take_and_send)
            far.sendall(b"x")
            with trio.fail_after(5):
                assert await trio.to_thread.run_sync(threading.get_ident) != threading.get_ident()
                await trio.sleep(0.01)
                await far_end.send(b"y")
                assert await near_end.recv(1) == b"y"
            nursery.cancel_scope.cancel()


async def test_all_are_idle_and_the_clock_jumps_though_there_were_tokens(pair: Pair) -> None:
    """What waits for silence (trio's tests, a virtual clock) is told of it after a token as ever."""
    stream, far = pair
    taker = Taker()
    async with shared() as nursery:
        nursery.start_soon(stream.read_into, taker.take)
        for count in (1, 2):
            nursery.start_soon(wait_all_tasks_blocked, 0.02)
            await wait_all_tasks_blocked()
            far.sendall(b"x")
            with trio.fail_after(5):
                await wait_all_tasks_blocked(0.05)
            assert taker.taken == [b"x"] * count
        nursery.cancel_scope.cancel()


async def test_a_wait_with_a_token_is_no_silence(pair: Pair) -> None:
    stream, far = pair
    taker = Taker(1)
    async with shared() as nursery:
        nursery.start_soon(stream.read_into, taker.take)
        await wait_all_tasks_blocked()
        waiting = trio.lowlevel.current_task()._runner.io_manager
        far.sendall(b"x")
        assert waiting.get_events(0.0)
        assert taker.taken == [b"x"]
        assert not waiting.get_events(0.0)


@ALL
async def test_what_threads_want_called_is_called_in_the_loop(reading: Reading) -> None:
    """All of it, in each thread's order, also by trio's own way where nobody tells."""
    called: list[tuple[int, int, int]] = []
    all_called = trio.Event()

    def note(thread: int, number: int) -> None:
        called.append((thread, number, threading.get_ident()))
        if len(called) == 200:
            all_called.set()

    def call_from_thread(thread: int, call_soon: Callable[[Call], None]) -> None:
        for number in range(100):
            call_soon(partial(note, thread, number))

    async with reading() as nursery:
        await wait_all_tasks_blocked()
        call_soon = caller_from_threads()
        for thread in (1, 2):
            nursery.start_soon(trio.to_thread.run_sync, call_from_thread, thread, call_soon)
        with trio.fail_after(5):
            await all_called.wait()
    assert {ident for *_, ident in called} == {threading.get_ident()}
    for thread in (1, 2):
        assert [number for of, number, _ in called if of == thread] == list(range(100))


async def test_a_call_from_a_thread_is_no_pass_of_a_task_in_between() -> None:
    steps: list[str] = []

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            steps.append(task.name)

    async with shared():
        await wait_all_tasks_blocked()
        called = trio.Event()
        call_soon = caller_from_threads()
        instrument = Steps()
        trio.lowlevel.add_instrument(instrument)
        threading.Timer(0.01, call_soon, [called.set]).start()
        with trio.fail_after(5):
            await called.wait()
        trio.lowlevel.remove_instrument(instrument)
    assert not [name for name in steps if "run_sync_soon" in name], steps


async def test_what_is_called_while_it_ends_or_later_is_called_all_the_same(pair: Pair) -> None:
    called: list[str] = []
    late = trio.Event()
    with share_readiness() as readiness:
        assert readiness is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.run)
            await wait_all_tasks_blocked()
            call_soon = caller_from_threads()
            say = partial(call_soon, partial(called.append, "while it ends"))
            readiness.watch(pair[0]._socket.fileno(), lambda: None, say)
            nursery.cancel_scope.cancel()
    assert called == ["while it ends"]
    assert not readiness.call_soon(late.set), "it has ended"
    call_soon(late.set)
    with trio.fail_after(5):
        await late.wait()


async def test_its_descriptors_are_closed() -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(3):
        async with shared():
            await wait_all_tasks_blocked()
    assert opened() == before


async def test_of_two_at_once_each_tells_its_own_whichever_ends_first(pair: Pair, another_pair: Pair) -> None:
    takers = Taker(), Taker()
    async with trio.open_nursery() as nursery:
        ends: list[trio.CancelScope] = []
        for (stream, _), taker in zip((pair, another_pair), takers, strict=True):
            started = trio.Event()
            ends.append(await nursery.start(read_while_shared, stream, taker, started))
            await started.wait()
        for turn, end in enumerate(ends):
            for _, far in (pair, another_pair):
                far.sendall(b"x")
            await wait_all_tasks_blocked(0.02)
            assert [len(taker.taken) for taker in takers] == ([1, 1] if turn == 0 else [1, 2])
            end.cancel()
            await wait_all_tasks_blocked()


async def read_while_shared(
    stream: TcpStream, taker: Taker, started: trio.Event, task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    """Hand on what comes from it until its scope is cancelled."""
    with trio.CancelScope() as scope:
        async with sharing(), trio.open_nursery() as nursery:
            nursery.start_soon(stream.read_into, taker.take)
            await wait_all_tasks_blocked()
            task_status.started(scope)
            started.set()


async def test_one_that_another_closes_is_not_read(pair: Pair, another_pair: Pair) -> None:
    streams = pair[0], another_pair[0]

    async def read(stream: TcpStream) -> None:
        try:
            await stream.read_into(partial(close_other, stream))
        except trio.ClosedResourceError:
            closed.append(stream)

    def close_other(mine: TcpStream, _: bytes) -> bool:
        for stream in streams:
            if stream is not mine:
                nursery.start_soon(stream.aclose)
        return False

    closed: list[TcpStream] = []
    async with shared() as nursery:
        for stream in streams:
            nursery.start_soon(read, stream)
        await wait_all_tasks_blocked()
        pair[1].sendall(b"x")
    assert closed == [another_pair[0]]


async def test_when_nobody_reads_for_all_any_more_each_reads_alone(pair: Pair) -> None:
    stream, far = pair
    taker = Taker(2)
    async with trio.open_nursery() as reading:
        async with sharing() as readiness:
            assert readiness is not None
            assert shared_readiness() is readiness
            reading.start_soon(stream.read_into, taker.take)
            await wait_all_tasks_blocked()
            far.sendall(b"a")
            await wait_all_tasks_blocked()
        assert shared_readiness() is None
        readiness.watch(far.fileno(), lambda: None)  # by somebody who has not heard of it
        far.sendall(b"b")
    assert taker.taken == [b"a", b"b"]
    assert len(set(taker.in_tasks)) == 2


async def test_who_waits_while_it_ends_reads_alone_before_the_block_is_left(pair: Pair) -> None:
    stream, far = pair
    taker = Taker(1)
    with share_readiness() as readiness:
        assert readiness is not None
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(readiness.run)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert shared_readiness() is None
        far.sendall(b"a")
        await stream.read_into(taker.take)
    assert taker.taken == [b"a"]


async def test_the_latest_counts_and_then_the_one_before() -> None:
    with share_readiness() as first:
        with share_readiness() as second:
            assert shared_readiness() is second
        assert shared_readiness() is first
    assert shared_readiness() is None


async def test_one_that_is_left_early_takes_nothing_from_the_latest() -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(share_readiness())
        latest = second.enter_context(share_readiness())
        first.close()
        assert shared_readiness() is latest


async def test_what_is_taken_is_in_the_context_of_who_waits(pair: Pair, another_pair: Pair) -> None:
    """A log line says which key it was for (``structlog.contextvars``)."""
    variable: ContextVar[str] = ContextVar("variable", default="nobody's")
    seen: list[str] = []

    def take(data: bytes) -> bool:
        seen.append(variable.get())
        variable.set("changed by " + data.decode())
        return data == b"a"

    async def read(stream: TcpStream, mine: str) -> None:
        variable.set(mine)
        await stream.read_into(take)
        seen.append(variable.get())

    async with shared() as nursery:
        nursery.start_soon(read, pair[0], "first's")
        nursery.start_soon(read, another_pair[0], "second's")
        for far, data in ((pair[1], b"a"), (another_pair[1], b"b"), (pair[1], b"c")):
            await wait_all_tasks_blocked()
            far.sendall(data)
        await wait_all_tasks_blocked()
    assert seen == ["first's", "second's", "changed by b", "changed by a", "changed by c"]


async def test_a_second_task_is_refused_and_does_not_harm_the_first(pair: Pair) -> None:
    stream, far = pair
    taker = Taker(1)
    async with shared() as nursery:
        nursery.start_soon(stream.read_into, taker.take)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await stream.read_into(Taker().take)
        far.sendall(b"a")
    assert taker.taken == [b"a"]


async def test_one_stream_without_memory_is_not_all_streams_end(
    pair: Pair, another_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(descriptor: int, max_bytes: int) -> bytes:
        if descriptor == poor:
            raise MemoryError
        return really(descriptor, max_bytes)

    poor, really = pair[0]._socket.fileno(), os.read
    monkeypatch.setattr("providers.tcp.os.read", read)
    async with shared() as nursery:
        await fail_beside_another(nursery, MemoryError, Taker().take, pair, another_pair)


async def test_without_epoll_each_reads_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll")
    taker = Taker(1)
    pair[1].sendall(b"a")
    async with sharing():
        assert shared_readiness() is None
        await pair[0].read_into(taker.take)
    assert set(taker.in_tasks) == {trio.lowlevel.current_task()}
