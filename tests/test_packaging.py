"""What is declared, locked and installed, and what an import of each layer loads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
MANDATED = {"trio", "httpx", "quart-trio", "hypercorn", "pytest-trio", "trio-typing"}

IMPORT_AND_LIST = """
import importlib, json, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    if name in ("engine", "providers"):
        for module in pkgutil.walk_packages(package.__path__, name + "."):
            importlib.import_module(module.name)
print(json.dumps([name.partition(".")[0] for name in sys.modules]))
"""


def loaded_by(*names: str) -> set[str]:
    """Top-level names in ``sys.modules`` after a fresh interpreter has imported these, of ours every module."""
    command = [sys.executable, "-c", IMPORT_AND_LIST, *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in requirements}


def entries_of(lock: Path) -> list[str]:
    """One string for each requirement of a lock file, its continuation lines joined, comments dropped."""
    lines = [line for line in lock.read_text().splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def test_engine_loads_trio_and_msgspec_only() -> None:
    loaded = loaded_by("engine")
    assert not loaded & {"httpx", "h11", "quart", "hypercorn", "sqlalchemy", "structlog", "click"}
    own = {name for name in loaded if not name.startswith("_sysconfigdata")}  # the standard library's, by platform
    assert own - loaded_by("trio", "msgspec") - sys.stdlib_module_names == {"engine"}


def test_providers_load_no_server_library() -> None:
    loaded = loaded_by("providers")
    assert not loaded & {"quart", "quart_trio", "hypercorn", "sqlalchemy", "structlog", "server"}
    known = loaded_by("trio", "msgspec", "httpx", "httpcore", "h11", "certifi")
    assert loaded - known - sys.stdlib_module_names <= {"providers", "engine"}


def test_trio_typing_is_not_installed() -> None:
    for module in ("trio_typing", "trio-stubs"):
        assert importlib.util.find_spec(module) is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("trio-typing")


def test_the_mandated_packages_are_declared() -> None:
    extras = project()["optional-dependencies"]
    declared = names_of(project()["dependencies"]).union(*map(names_of, extras.values()))
    assert declared >= MANDATED
    assert names_of(extras["legacy-stubs"]) == {"trio-typing"}


def test_locks_hold_all_that_is_declared() -> None:
    runtime = names_of(project()["dependencies"])
    extras = {extra: names_of(requirements) for extra, requirements in project()["optional-dependencies"].items()}
    locked = {lock.stem: names_of(entries_of(lock)) for lock in LOCKS}
    assert locked["run"] >= runtime
    assert locked["dev"] >= runtime | extras["test"] | extras["check"]
    assert locked["legacy-stubs"] >= extras["legacy-stubs"]
    assert "trio-typing" not in locked["run"] | locked["dev"]


def test_the_locks_agree_on_versions() -> None:
    run, dev = (
        {entry.split()[0] for entry in entries_of(ROOT / "requirements" / name)} for name in ("run.txt", "dev.txt")
    )
    assert run <= dev


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_locked_version_has_hashes(lock: Path) -> None:
    entries = entries_of(lock)
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9.-]+==\S+( ; [^\\]+?)?( +--hash=sha256:[0-9a-f]{64})+$", entry), entry


def test_no_file_of_the_set_up_names_a_registry() -> None:
    hosts = ["pypi" + ".", "python" + "hosted", "debian" + ".org", "npm" + "js", "ubuntu" + ".com"]
    options = ["index" + "-url", "find" + "-links"]
    set_up = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".flake8", *(ROOT / ".ci").iterdir()]
    for file in [*set_up, *LOCKS]:
        text = file.read_text().replace("--no-emit-index-url", "")
        assert [word for word in hosts + options if word in text] == [], file
    for lock in LOCKS:
        assert "://" not in lock.read_text()


def test_the_console_script_is_declared() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lumos")
    assert script.value == "server.cli:main"
