"""A real nginx for the tests: ``docs/deploy/nginx.conf`` on ports and folders of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEPLOYED = ROOT / "docs" / "deploy" / "nginx.conf"
STOP_SECONDS = 10.0

_MAIN = """
{user}
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
    access_log off;
    {temporary}
    include {folder}/lumos.conf;
}}
"""
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def find_nginx() -> str:
    """The program.

    Raises:
        FileNotFoundError: nginx is not installed.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise FileNotFoundError("these tests need nginx: apt-get install nginx-light (.ci/run does so)")
    return program


def write_config(folder: Path, listen: str, app: str, changes: tuple[tuple[str, str], ...] = ()) -> Path:
    """The deployed file with these addresses, and the main file around it; the main file's path."""
    text = DEPLOYED.read_text()
    own = (
        ("/var/cache/nginx-lumos", f"{folder}/cache"),
        ("server 127.0.0.1:8080", f"server {app}"),
        ("listen 80;", f"listen {listen};"),
        *changes,
    )
    for old, new in own:
        assert text.count(old) == 1, f"{old!r} is not once in {DEPLOYED}"
        text = text.replace(old, new)
    (folder / "lumos.conf").write_text(text)
    temporary = "\n    ".join(f"{name}_temp_path {folder}/{name};" for name in _TEMPORARY)
    user = "user root;" if os.geteuid() == 0 else ""
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(user=user, folder=folder, temporary=temporary))
    return main


@contextmanager
def running_nginx(folder: Path, app: str, *changes: tuple[str, str]) -> Iterator[str]:
    """An nginx in front of the app at that ``host:port``; its URL. ``changes`` are made to the deployed file.

    It inherits a socket that listens already: nobody has to ask again and again whether it is up.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        config = write_config(folder, address, app, changes)
        process = subprocess.Popen(
            [find_nginx(), "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")],
            pass_fds=[listening.fileno()],
            env=os.environ | {"NGINX": f"{listening.fileno()};"},
            stdin=subprocess.DEVNULL,
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
