"""The files under docs/deploy/: whole, and their times fit those of the server."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from providers.http import open_client
from server.agents import read_agents_file
from server.compose import CLEANUP_SECONDS, ServerSettings
from server.factory import AgentFactory
from server.store.database import Database
from server.tool_registry import ToolRegistry

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
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


FIRST_KEY = "lumos keys create --tenant acme --user ada --admin"


def test_every_file_that_compose_takes_is_there() -> None:
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    mounts = [mount for each in services.values() for mount in each.get("volumes", ()) if mount.startswith(".")]
    assert mounts
    for mount in mounts:
        assert (DEPLOY / mount.partition(":")[0]).is_file(), mount
    build = services["lumos"]["build"]
    root = (DEPLOY / build["context"]).resolve()
    assert (root / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")


def test_the_image_takes_all_that_the_package_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    taken = [Path(name) for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in taken)
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert {*packages, "pyproject.toml", *project["project"]["license-files"]} <= {str(name) for name in taken}
    (extras,) = re.findall(r"/src\[([\w,]+)\]", "\n".join(lines))
    assert {"postgres", "redis"} <= set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


def test_the_example_agents_serve_without_any_key() -> None:
    records = read_agents_file(DEPLOY / "agents.toml")
    assert records
    with closing(Database.open("sqlite://", inline=True)) as database:
        factory = AgentFactory(database, {}, open_client(), ToolRegistry())
        for record in records:
            factory.check(record)


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_who_listens_for_others_is_told_how_to_make_the_first_key(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert "0.0.0.0" in text
    assert FIRST_KEY in text.replace('","', " ")
    assert FIRST_KEY in (DEPLOY.parent / "deploy.md").read_text()


def test_the_cache_of_nginx_is_in_a_folder_that_every_debian_has() -> None:
    (folder,) = re.findall(r"^proxy_cache_path (\S+)", (DEPLOY / "nginx.conf").read_text(), re.MULTILINE)
    assert Path(folder).parent == Path("/var/cache")


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
