"""How fast the servers' core is while they are measured: a process on it does the same piece of work again and again.

    python -m benchmarks.bench.yardstick < PIPE > FILE

A virtual core's speed is its neighbours' too: here the same work took up to 1.6 times its own CPU time, from one tenth
of a second to the next. What a trial took is therefore divided by what a piece took at the same time, and multiplied,
once the run is over, by what a piece takes when the core is fast (``Speed.fast_us``).

A piece is some 0.2 ms of much code, run once after a sleep, as a server's is: Python's parser. Of what was tried, it
slowed down as servers do; loops of arithmetic, JSON, and what had just run before, slowed down more.
It has the lowest priority and not ``SCHED_IDLE``, which starves on a full core (4 pieces a second instead of 87).
"""

from __future__ import annotations

import ast
import gc
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median

import msgspec

from benchmarks.bench.process import before_others
from benchmarks.bench.result import Speed
from benchmarks.bench.statistics import nearest_rank

PERIOD_SECONDS = 0.015
NEAR_NS = 60_000_000
"""Pieces so far from a moment tell of its speed: states of the core last a tenth of a second or longer."""

FAST_PERCENT = 2.0
"""Of all pieces of a run, so many are done when the core is at its fastest."""

SLOW = 1.2
"""A piece that takes so many times the fast ones' time was done on a slow core."""

_FAR = 3.0
"""Times the median: what the hypervisor took away during a piece, not how fast the core was."""

_RECORD = struct.Struct("<qq")
_ROOT = Path(__file__).parents[2]
_ENDING_SECONDS = 5.0

_PROGRAM = '''
def literal(node, *, deep=True):
    """x"""
    if isinstance(node, str):
        node = parse(node.lstrip(), mode="eval")
    for a, b in zip(node.keys, node.values):
        try:
            yield a[b] + 1 if a else {a: b for a in b if b}
        except (KeyError, ValueError) as e:
            return [lambda x: x**2, *a, e]
'''


def piece() -> None:
    """The work, the same each time."""
    ast.parse(_PROGRAM)


class Pieces(msgspec.Struct, frozen=True):
    """What pieces took of their own CPU time, and when they were done (CLOCK_MONOTONIC), in nanoseconds and order."""

    at_ns: Sequence[int] = ()
    took_ns: Sequence[int] = ()

    def between(self, first_ns: int, last_ns: int) -> Pieces:
        """Those of that time."""
        first, last = bisect_left(self.at_ns, first_ns), bisect_right(self.at_ns, last_ns)
        return Pieces(self.at_ns[first:last], self.took_ns[first:last])

    def mean_us(self) -> float | None:
        """As CPU time adds up, so do they; None of none."""
        if not self.took_ns:
            return None
        most = _FAR * median(self.took_ns)
        return fmean(took for took in self.took_ns if took <= most) / 1e3

    def near_us(self, at_ns: int) -> float | None:
        """What a piece took around that time: the median of those near, else the nearest; None of none."""
        if near := self.between(at_ns - NEAR_NS, at_ns + NEAR_NS).took_ns:
            return median(near) / 1e3
        if not self.at_ns:
            return None
        after = bisect_left(self.at_ns, at_ns)
        places = range(max(after - 1, 0), min(after + 1, len(self.at_ns)))
        return self.took_ns[min(places, key=lambda place: abs(self.at_ns[place] - at_ns))] / 1e3

    def then(self, others: Sequence[Pieces]) -> Pieces:
        """These and the others, which are later and in order."""
        every = [self, *others]
        return Pieces(
            [at_ns for pieces in every for at_ns in pieces.at_ns],
            [took_ns for pieces in every for took_ns in pieces.took_ns],
        )

    def speed(self) -> Speed | None:
        """Of a whole run; None of none."""
        fast = nearest_rank(self.took_ns, FAST_PERCENT)
        if fast is None:
            return None
        slow = sum(took > SLOW * fast for took in self.took_ns) / len(self.took_ns)
        return Speed(
            fast_us=round(fast / 1e3, 1),
            slow_share=round(slow, 3),
            mean_slowdown=round((self.mean_us() or 0) * 1e3 / fast, 3),
            pieces=len(self.took_ns),
        )


class Yardstick:
    """Reads what the process writes; ``running_yardstick`` makes one and ends it."""

    def __init__(self, file: int, pid: int) -> None:
        self._file, self.pid = file, pid
        self._read = 0
        self._at, self._took = array("q"), array("q")

    def pieces(self) -> Pieces:
        """All until now."""
        while block := os.pread(self._file, 1 << 16, self._read):
            whole = len(block) - len(block) % _RECORD.size
            if not whole:
                break
            for at_ns, took_ns in _RECORD.iter_unpack(block[:whole]):
                self._at.append(at_ns)
                self._took.append(took_ns)
            self._read += whole
        return Pieces(self._at, self._took)


@contextmanager
def running_yardstick(core: int | None, *, first: bool = False) -> Iterator[Yardstick | None]:
    """On that core, until the block or this process ends, however it does; None without a core.

    With ``first``, it has the priority that servers then have, or others' work would leave it no time beside them.
    """
    if core is None:
        yield None
        return
    command = [sys.executable, "-m", "benchmarks.bench.yardstick", str(core)]
    with tempfile.TemporaryFile() as file:
        with before_others(first):
            process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=file)
        try:
            yield Yardstick(file.fileno(), process.pid)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_ENDING_SECONDS)
            except subprocess.TimeoutExpired:  # no time for it on a full core
                process.kill()
                process.wait()


def measure(core: int, owner: int, out: int) -> None:
    """Do pieces on the core and write what they took, until the owner's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's
    os.nice(19)
    os.sched_setaffinity(0, {core})
    gc.disable()
    gc.freeze()
    while not select.select([owner], [], [], PERIOD_SECONDS)[0]:
        before = time.thread_time_ns()
        piece()
        took_ns = time.thread_time_ns() - before
        os.write(out, _RECORD.pack(time.monotonic_ns(), took_ns))


if __name__ == "__main__":
    measure(int(sys.argv[1]), sys.stdin.fileno(), sys.stdout.fileno())
