"""The load: opens streams at their times, whatever becomes of the others, and notes when each event came.

    python -m benchmarks.bench.client < job.json

Reads one ``Job`` and prints one ``Outcome``; progress on stderr. Open loop: a stream's latency counts from the time it
was scheduled for, also when the client, the listener's queue or the server was late.
"""

from __future__ import annotations

import gc
import sys
import time
from time import monotonic_ns

import click
import msgspec

from benchmarks.bench.histogram import Histogram
from benchmarks.bench.job import Job, Outcome, Progress, Stream
from benchmarks.bench.loop import Loop, prepare_process
from benchmarks.bench.reader import Reader, Tally

SECOND = 1_000_000_000
PROGRESS_NS = SECOND // 2
_HEAD_START_NS = 20_000_000


class Client:
    """One job; ``run`` returns once every stream has ended or patience has."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loop = Loop()
        self._start_ns = monotonic_ns() + _HEAD_START_NS
        first, last = job.window_s or (-3600.0, 1e6)
        window = (self._start_ns + round(first * SECOND), self._start_ns + round(last * SECOND))
        self.tally = Tally(window)
        self._start_lateness = Histogram()
        self._readers: list[Reader] = []
        self._open: set[Reader] = set()
        self._begun = 0
        self._progress: list[Progress] = []

    def run(self) -> Outcome:
        """All streams."""
        job, loop = self._job, self._loop
        cpu_before = time.process_time()
        if job.starts_s:
            self._schedule()
            loop.call_at(self._start_ns + PROGRESS_NS, self._tell)
            loop.run()
        self._note_progress()
        streams = [reader.stream for reader in self._readers]
        lateness = Histogram()
        lateness.add_all(self.tally.lateness if job.stamps == "clock" else map(abs, self.tally.lateness))
        return Outcome(
            start_ns=self._start_ns,
            streams=streams,
            lateness=lateness,
            events=self.tally.events,
            events_in_window=len(self.tally.lateness),
            window_ns=self.tally.window_ns,
            start_lateness=self._start_lateness,
            cpu_s=time.process_time() - cpu_before,
            progress=self._progress,
        )

    def _schedule(self) -> None:
        job = self._job
        if job.one_at_a_time:
            self._start(self._start_ns + round(job.starts_s[0] * SECOND))
            return
        for start_s in sorted(job.starts_s):
            self._start(self._start_ns + round(start_s * SECOND))
        self._loop.call_at(self._start_ns + round((max(job.starts_s) + job.patience_s) * SECOND), self._give_up)

    def _start(self, scheduled_ns: int) -> None:
        """Open one more stream at that time."""
        number = len(self._readers)
        stream = Stream(self._job.first_tag + number, scheduled_ns)
        reader = Reader(self._job, stream, self._loop, self.tally, self._ended, number)
        self._readers.append(reader)

        def begin() -> None:
            self._start_lateness.add(monotonic_ns() - scheduled_ns)
            self._begun += 1
            self._open.add(reader)
            if self._job.one_at_a_time:
                patience_ns = round(self._job.patience_s * SECOND)
                self._loop.call_at(scheduled_ns + patience_ns, reader.give_up)
            reader.begin()

        self._loop.call_at(scheduled_ns, begin)

    def _ended(self, reader: Reader) -> None:
        """Called once by each stream that has begun."""
        self._open.discard(reader)
        starts, begun = self._job.starts_s, len(self._readers)
        if self._job.one_at_a_time and begun < len(starts):
            self._start(monotonic_ns() + round((starts[begun] - starts[begun - 1]) * SECOND))
        elif self._begun == len(starts) and not self._open:
            self._loop.stop()

    def _give_up(self) -> None:
        for reader in list(self._open):
            reader.give_up()
        self._loop.stop()

    def _note_progress(self) -> Progress:
        still_open = len(self._open)
        progress = Progress(monotonic_ns(), self.tally.events, self._begun, still_open, self._begun - still_open)
        self._progress.append(progress)
        return progress

    def _tell(self) -> None:
        sys.stderr.write(msgspec.json.encode(self._note_progress()).decode() + "\n")
        sys.stderr.flush()
        self._loop.call_at(monotonic_ns() + PROGRESS_NS, self._tell)


@click.command()
@click.option("--cpu", type=int, help="Run on this core alone, before others if allowed.")
def main(cpu: int | None) -> None:
    """Do the job on stdin."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    prepare_process(cpu)
    outcome = Client(job).run()
    gc.enable()
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")


if __name__ == "__main__":
    main()
