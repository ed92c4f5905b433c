"""The machine: what is told of it, and which of its cores does what."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import msgspec

from benchmarks.bench.environments import ROOT
from benchmarks.bench.result import Environment

PACKAGES = ("lumos-stream", "trio", "quart-trio", "hypercorn", "h11", "httpx", "msgspec", "sqlalchemy")


class Cores(msgspec.Struct, frozen=True):
    """CPUs that processes are bound to; None: the system chooses."""

    arm: int | None
    instruments: int | None
    """Of upstream, client and whoever drives them."""
    first: bool = False
    """The arm runs before whatever else there is, as upstream and client do."""


def cores(*, first: bool = False) -> Cores:
    """The arm gets one of its own where there are two."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    return Cores(allowed[1], allowed[0], first) if len(allowed) > 1 else Cores(None, None, first)


def environment(cores: Cores) -> Environment:
    """What a result says of where it was measured."""
    return Environment(
        cpu=_cpu(),
        cpus=os.cpu_count() or 1,
        kernel=platform.release(),
        python=platform.python_version(),
        versions={name: version(name) for name in PACKAGES},
        first=cores.first,
    )


def git() -> str:
    """The commit, with a + if there are changes; "" outside a repository."""
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + "+" * bool(changes)


def _cpu() -> str:
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        if row.startswith("model name"):
            return row.partition(":")[2].strip()
    return platform.machine()
