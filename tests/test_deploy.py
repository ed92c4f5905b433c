"""The files under docs/deploy/: whole, and their times fit those of the server."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from server.compose import CLEANUP_SECONDS, ServerSettings

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"
DRAIN = ServerSettings().drain
STOPPING = DRAIN + ServerSettings().limits.closing + CLEANUP_SECONDS
"""The longest that a stop takes, in seconds."""


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "lumos.service")
    return parser


def test_systemd_waits_for_the_drain() -> None:
    service = unit()["Service"]
    assert int(service["TimeoutStopSec"]) > STOPPING
    assert f"--drain {DRAIN:g}" in service["ExecStart"]
    assert service["KillSignal"] == "SIGTERM"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:  # not on every machine; the other test reads the file everywhere
        return
    text = (DEPLOY / "lumos.service").read_text().replace("/opt/lumos/.venv/bin/lumos", "/bin/true")
    (tmp_path / "lumos.service").write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", tmp_path / "lumos.service"], capture_output=True, text=True, check=False
    )
    assert "lumos.service" not in done.stderr, done.stderr


def test_compose_waits_for_the_drain() -> None:
    (compose,) = documents("compose.yaml")
    lumos = compose["services"]["lumos"]
    assert int(lumos["stop_grace_period"].removesuffix("s")) > STOPPING
    assert f"--drain {DRAIN:g}" in lumos["command"]


def test_compose_has_the_redis_that_its_workers_need() -> None:
    (compose,) = documents("compose.yaml")
    lumos, redis = compose["services"]["lumos"], compose["services"]["redis"]
    assert "--workers 2" in lumos["command"]
    assert lumos["environment"]["LUMOS_REDIS_URL"].startswith("redis://redis:")
    assert set(lumos["depends_on"]) == {"postgres", "redis"}
    assert "--maxmemory-policy noeviction" in redis["command"]


def test_kubernetes_waits_for_the_drain_and_does_not_buffer() -> None:
    deployment, service, ingress = documents("kubernetes.yaml")
    assert [each["kind"] for each in (deployment, service, ingress)] == ["Deployment", "Service", "Ingress"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + STOPPING
    assert container["args"][-2:] == ["--drain", f"{DRAIN:g}"]
    annotations = ingress["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert annotations["nginx.ingress.kubernetes.io/proxy-http-version"] == "1.1"
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > 120
