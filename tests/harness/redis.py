"""A Redis of our own for the tests: a real ``redis-server`` on a port of its own that can be killed and restarted."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

STARTING_SECONDS = 10.0


class RedisServer:
    """A ``redis-server`` whose data is in a folder. Whoever starts it kills it."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started yet.

        Raises:
            FileNotFoundError: Redis is not installed.
        """
        program = shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError("these tests need Redis: apt-get install redis-server (.ci/run does so)")
        self._program = program
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it with what it had on disk; returns once it can be connected to."""
        assert self._process is None
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "no",
            "save": "",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [self._program, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._process.stdout is not None
        said = b""
        for line in self._process.stdout:
            said += line
            if b"eady to accept connections" in line:
                return
        raise RuntimeError(f"redis-server did not start:\n{said.decode(errors='replace')}")

    def kill(self) -> None:
        """``kill -9``, if it runs. What it has written survives."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def lose_everything(self) -> None:
        """Delete what is on disk; it must not be running."""
        assert self._process is None
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def pause(self) -> None:
        """It stands still, and its connections with it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A running Redis, empty, that the test may kill and start."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    server.start()
    yield server
    server.kill()
