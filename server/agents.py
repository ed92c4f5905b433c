"""Agents from a file, and those that are built in: their records, not how they are built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from providers.registry import ModelConfig

from .mcp_tools import McpServerConfig
from .records import AgentRecord


class AgentsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole agents file: agents, and the MCP servers that their tools may come from."""

    agent: list[AgentRecord] = []
    mcp_server: list[McpServerConfig] = []


class AgentsFileError(ValueError):
    """An agents file cannot be used; the text names the file and the place."""


class UnknownAgentError(ValueError):
    """No agent of that id is built in or declared."""


BUILT_IN_AGENTS = (
    AgentRecord(
        id="demo",
        name="Replays a real GPT-4o answer of a few seconds",
        system="",
        llm_config=ModelConfig(provider="replay", model="gpt4o-demo"),
    ),
    AgentRecord(
        id="demo-93s",
        name="Replays a 93-second answer",
        system="",
        llm_config=ModelConfig(provider="replay", model="demo-93s"),
    ),
    AgentRecord(
        id="demo-tools",
        name="Calls two tools, then replays its answer",
        system="",
        tools=("calculator", "current_time"),
        llm_config=ModelConfig(provider="replay", model="demo-tools"),
    ),
)


def read_agents_file(path: Path) -> list[AgentRecord]:
    """The agents that the TOML file declares. Raises as ``read_whole_agents_file``."""
    return read_whole_agents_file(path).agent


def read_whole_agents_file(path: Path) -> AgentsFile:
    """What the TOML file declares.

    Raises:
        AgentsFileError: the file cannot be read, is no TOML, has another shape, or names an agent or a server twice.
    """
    try:
        whole = msgspec.toml.decode(path.read_bytes(), type=AgentsFile)
    except OSError as error:
        raise AgentsFileError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AgentsFileError(f"{path}: {error}") from error
    named = [f"agent {record.id!r}" for record in whole.agent]
    named += [f"MCP server {server.name!r}" for server in whole.mcp_server]
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise AgentsFileError(f"{path}: {twice[0]} is declared twice")
    return whole


def find_record(agent_id: str, records: Sequence[AgentRecord]) -> AgentRecord:
    """The record of that id among the built-in agents and these, which win.

    Raises:
        UnknownAgentError: there is none; the text names those there are.
    """
    known = {record.id: record for record in (*BUILT_IN_AGENTS, *records)}
    if agent_id not in known:
        raise UnknownAgentError(f"there is no agent {agent_id!r}; there are: {', '.join(known)}")
    return known[agent_id]
