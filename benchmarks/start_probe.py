"""`lumos serve` with counters: SIGUSR1 begins, the next one writes what was seen; SIGUSR2 begins with a profile too.

python -m benchmarks.start_probe OUT serve --port 8080 …
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import trio
from sqlalchemy import Engine, event

LINES = 70


class Counts(msgspec.Struct):
    """What was seen between two signals."""

    numbers: dict[str, int]
    statements: dict[str, int]
    profile: str


class Probe(trio.abc.Instrument):
    """Counts in this process; profiles, when asked, the main thread and what worker threads run."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._on = False
        self._main = cProfile.Profile()
        self._profiles: dict[int, cProfile.Profile] = {}
        self._profiled = False
        self.numbers: Counter[str] = Counter()
        self.statements: Counter[str] = Counter()

    def install(self) -> None:
        """Hook into SQLAlchemy, trio's threads and the signals."""
        event.listen(Engine, "connect", lambda connection, _: connection.set_trace_callback(self._on_statement))
        run_sync = trio.to_thread.run_sync

        async def counted(sync: Any, *args: Any, **options: Any) -> Any:
            self._count("thread hops")
            return await run_sync(self._in_thread(sync), *args, **options)

        start = trio.lowlevel.start_thread_soon

        def counted_start(sync: Any, *args: Any, **options: Any) -> None:
            self._count("thread hops")
            start(self._in_thread(sync), *args, **options)

        trio.to_thread.run_sync = counted  # type: ignore[assignment]
        trio.lowlevel.start_thread_soon = counted_start  # type: ignore[assignment]
        signal.signal(signal.SIGUSR1, self._toggle)
        signal.signal(signal.SIGUSR2, self._toggle)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        """Count."""
        self._count("task steps")

    def task_spawned(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        """Count."""
        self._count("tasks")

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
        """Count."""
        self._count("scheduler passes")

    def _count(self, what: str) -> None:
        if self._on:
            self.numbers[what] += 1

    def _on_statement(self, statement: str) -> None:
        """SQLite's own word, prepared statements too; what triggers do begins with two dashes."""
        if self._on and not statement.startswith("--"):
            self.numbers["statements"] += 1
            self.numbers["transactions"] += statement.startswith("BEGIN")
            self.statements[" ".join(statement.split()[:3])] += 1

    def _in_thread(self, sync: Any) -> Any:
        if not self._profiled:
            return sync

        def profiled(*args: Any) -> Any:
            profile = self._profiles.setdefault(threading.get_ident(), cProfile.Profile())
            profile.enable()
            try:
                return sync(*args)
            finally:
                profile.disable()

        return profiled

    def _toggle(self, signum: int, _frame: Any) -> None:
        if not self._on:
            self._on, self._profiled = True, signum == signal.SIGUSR2
            if self._profiled:
                self._main.enable()
            return
        self._on = False
        self._main.disable()
        self._out.with_suffix(".new").write_bytes(
            msgspec.json.encode(Counts(dict(self.numbers), dict(self.statements), self._report()))
        )
        os.replace(self._out.with_suffix(".new"), self._out)

    def _report(self) -> str:
        if not self._profiled:
            return ""
        text = io.StringIO()
        for title, profiles in (("main thread", [self._main]), ("worker threads", list(self._profiles.values()))):
            if profiles:
                stats = pstats.Stats(*profiles, stream=text)
                text.write(f"\n== {title}\n{_by_package(stats)}\n")
                stats.sort_stats("tottime").print_stats(LINES)
                stats.sort_stats("cumulative").print_stats(LINES * 2)
        return text.getvalue()


def _by_package(stats: Any) -> str:
    """Seconds and calls by whose code it is; a C function counts for itself."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for (path, _, name), (_, count, own, _, _) in stats.stats.items():
        parts = Path(path).parts
        whose = parts[parts.index("site-packages") + 1] if "site-packages" in parts else name if path == "~" else path
        for ours in ("server/store", "server", "engine", "providers"):
            if f"/{ours}/" in path and "site-packages" not in path:
                whose = ours
                break
        seconds[whose] += own
        calls[whose] += count
    return "\n".join(f"{calls[whose]:9} {own:8.3f} s  {whose}" for whose, own in seconds.most_common(24))


def main() -> None:
    """Be the server."""
    from server.cli import main as serve  # noqa: PLC0415 - after the hooks

    probe = Probe(Path(sys.argv.pop(1)))
    probe.install()
    run = trio.run

    def with_probe(*args: Any, **options: Any) -> Any:
        return run(*args, **{**options, "instruments": [probe]})

    trio.run = with_probe  # type: ignore[assignment]
    serve()


if __name__ == "__main__":
    main()
