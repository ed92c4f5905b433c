"""Commands run in the test's process, and agents files for them."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path

from click.testing import CliRunner, Result

from server.cli import main

LUMOS = Path(sysconfig.get_path("scripts")) / "lumos"
"""The command as it is installed."""

SURROUNDINGS = {"no_proxy": "*", "LUMOS_DATABASE_URL": "sqlite://"}
"""No proxy, and a database in memory: a command leaves no file behind."""


def lumos(*arguments: str | Path, typed: str | None = None, env: Mapping[str, str | None] | None = None) -> Result:
    """Run the command to its end, without a terminal; ``typed`` is its standard input."""
    environment = {**SURROUNDINGS, **(env or {})}
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=typed, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def complaint(result: Result) -> str:
    """The one line that a failed command says, without its ``lumos: ``."""
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("lumos: ")
    return line.removeprefix("lumos: ")


def write_agents(directory: Path, text: str) -> Path:
    """An agents file with this text."""
    path = directory / "agents.toml"
    path.write_text(text)
    return path


def agent_at(base_url: str, agent_id: str = "local") -> str:
    """The table of an agent whose model server is a local one."""
    return f"""
        [[agent]]
        id = "{agent_id}"
        system = "Be brief."
        [agent.llm_config]
        provider = "openai_compatible"
        model = "m"
        base_url = "{base_url}/v1"
        """
