"""Environments of the peers: build/bench/<name>/, each with pinned packages, made again when its pins change."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "bench"
REQUIREMENTS = Path(__file__).parent / "requirements"
STAMP = ".bench-stamp"

_PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")


class EnvironmentFailedError(RuntimeError):
    """An environment could not be made; the text is what pip said."""


def requirements_file(name: str) -> Path:
    """Where its pins are."""
    return REQUIREMENTS / f"{name}.txt"


def python_of(name: str) -> Path:
    """The interpreter of an environment, made or not."""
    return BUILD / name / "bin" / "python"


def is_made(name: str) -> bool:
    """Whether it is there with the pins of today, for the Python of today."""
    stamp = BUILD / name / STAMP
    return stamp.exists() and stamp.read_text() == _stamp(name)


def make(name: str) -> Path:
    """Make the environment unless it is made already; its interpreter.

    Raises:
        EnvironmentFailedError: pip failed.
    """
    python = python_of(name)
    if is_made(name):
        return python
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), *_PIP, "install", "-qq", "--no-deps", "-r", str(requirements_file(name))])
    _run([str(python), *_PIP, "check"])
    (folder / STAMP).write_text(_stamp(name))
    return python


def versions(name: str) -> dict[str, str]:
    """What its pins say of every package, by name."""
    lines = requirements_file(name).read_text().splitlines()
    pins = (line.partition("#")[0].partition(";")[0].partition("==") for line in lines)
    return {package.partition("[")[0].strip(): version.strip() for package, _, version in pins if version}


def _stamp(name: str) -> str:
    pins = hashlib.sha256(requirements_file(name).read_bytes()).hexdigest()
    return msgspec.json.encode({"pins": pins, "python": sys.version}).decode()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentFailedError((done.stdout + done.stderr)[-4000:])
