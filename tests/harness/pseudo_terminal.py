"""A command in a terminal of its own, with someone at the keyboard: for what only a real Ctrl-C can show."""

from __future__ import annotations

import codecs
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

CTRL_C = "\x03"
CTRL_D = "\x04"
WAIT_SECONDS = 20.0
PRESS_AGAIN_SECONDS = 4.0

# Ctrl-C reaches the processes whose controlling terminal this is. A parent may have set SIGINT to be ignored.
_IN_THE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Keyboard:
    """What is typed into the terminal, and what it shows."""

    def __init__(self, terminal: int, process: subprocess.Popen[bytes]) -> None:
        self.shown = ""
        self._terminal = terminal
        self._process = process
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, keys: str) -> None:
        """Press the keys."""
        os.write(self._terminal, keys.encode())

    def see(self, text: str) -> str:
        """Wait until the text shows up behind what was seen before; returns what is between."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (at := self.shown.find(text, self._seen)) < 0:
            assert self._read(deadline), f"no {text!r} after: {self.shown[self._seen :]!r}"
        between = self.shown[self._seen : at]
        self._seen = at + len(text)
        return between

    def press_until_end(self, keys: str) -> None:
        """Press the keys, and again each few seconds until the command ends.

        Python's input() may miss a signal that comes just before it begins to wait (``readline_until_enter_or_signal``
        in CPython's ``Modules/readline.c``); whoever sits there presses again.
        """
        for _ in range(int(WAIT_SECONDS / PRESS_AGAIN_SECONDS)):
            self.type(keys)
            deadline = time.monotonic() + PRESS_AGAIN_SECONDS
            while self._read(deadline):
                pass
            if time.monotonic() < deadline:
                return

    def wait_end(self) -> int:
        """Wait until the command ends; its exit code. The rest of what it shows is in ``shown`` then."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self._read(deadline):
            pass
        return self._process.wait(WAIT_SECONDS)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], max(0, deadline - time.monotonic()))
        data = b""
        if ready:
            with suppress(OSError):  # Linux's EIO: the last process has let go of the terminal
                data = os.read(self._terminal, 65_536)
        self.shown += self._decoder.decode(data).replace("\r\n", "\n")
        return bool(data)


@contextmanager
def in_terminal(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Keyboard]:
    """Run the command, the first word a path, in a new terminal; it is killed if the block ends before it."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _IN_THE_TERMINAL, *command],
        env={**os.environ, "TERM": "dumb", "no_proxy": "*", **(environment or {})},
        start_new_session=True,
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    try:
        yield Keyboard(terminal, process)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
