"""A certificate for tests of TLS. The fixture ``certificate`` is in ``conftest.py``."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

NAMES = "DNS:localhost,DNS:model.test,DNS:proxy.test,IP:127.0.0.1"


class Certificate(NamedTuple):
    """A self-signed certificate for ``NAMES``, and its key."""

    file: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """What a server that shows it uses."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.load_cert_chain(self.file, self.key)
        return context

    def trusting_context(self) -> ssl.SSLContext:
        """What a client that trusts nothing else uses."""
        return ssl.create_default_context(cafile=self.file)


def make_certificate(folder: Path) -> Certificate:
    """Make one in the folder, by the openssl command."""
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    names = f"subjectAltName={NAMES}"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext {names}"
    subprocess.run([*command.split(), "-keyout", made.key, "-out", made.file], check=True, capture_output=True)
    return made
