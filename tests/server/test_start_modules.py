"""What a start loads. Names, not times: a module that is not needed at the start is not to be loaded there again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

LATER = {
    "coredis",
    "mcp",
    "numpy",
    "opentelemetry",
    "psycopg",
    "server.mcp_connection",
    "server.shared_log",
    "server.simulation",
    "server.terminal",
    "server.testing",
    "server.vendor_server",
    "server.workers",
    "sqlalchemy.dialects.mysql",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.orm",
}
"""Needed by some servers, or after the start."""

MOST_OF_OURS = 181
"""Modules of engine, providers and server: each is 0.3 ms. Lower it with each gain."""

_IMPORTED = re.compile(r"^import time: +\d+ \| +\d+ \| +(\S+)$", re.MULTILINE)
_MAIN = "import sys; from server.cli import main; main(sys.argv[1:])"


def loaded_by_a_start(folder: Path) -> set[str]:
    """By a server with a database in a file, until it serves."""
    agents = folder / "agents.toml"
    agents.write_text('[[agent]]\nid = "a"\nsystem = ""\n[agent.llm_config]\nprovider = "replay"\nmodel = "demo-93s"\n')
    command = [sys.executable, "-X", "importtime", "-c", _MAIN, "serve", "--port", "0", "--agents", str(agents)]
    command += ["--database-url", f"sqlite:///{folder / 'lumos.db'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUMOS_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        told = ""
        try:
            for line in process.stderr:
                told += line
                if "server.started" in line:
                    break
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            assert process.wait(10) == 0, told
        finally:
            process.kill()
    return set(_IMPORTED.findall(told))


def test_a_start_loads_nothing_that_may_come_later(tmp_path: Path) -> None:
    loaded = loaded_by_a_start(tmp_path)
    assert "server.composition" in loaded
    assert sorted(name for name in loaded if any(f"{name}.".startswith(f"{later}.") for later in LATER)) == []
    ours = [name for name in loaded if name.partition(".")[0] in ("engine", "providers", "server")]
    assert len(ours) <= MOST_OF_OURS, sorted(ours)
