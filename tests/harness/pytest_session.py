"""A user's test suite with our plugin, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BOTH = ("-p", "trio", "-p", "anyio")
"""The plugins of pytest-trio and anyio."""


def run_pytest(folder: Path, *options: str) -> str:
    """What a session over the folder says, with our plugin (installed or not) and no others than the options name."""
    command = [sys.executable, "-m", "pytest", "-p", "server.testing.plugin", "-p", "no:cacheprovider", *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    where = ["--rootdir", str(folder), str(folder)]
    done = subprocess.run(
        command + where, cwd=folder, env=variables, capture_output=True, text=True, timeout=50, check=False
    )
    return done.stdout + done.stderr
