"""Agents from a file, and the two that are built in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import msgspec

from engine import BasicAgent
from providers.registry import ModelConfig, ProviderConfigError, create_provider, default_model

from .records import AgentRecord


class AgentsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole agents file."""

    agent: list[AgentRecord] = []


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
)


def read_agents_file(path: Path) -> list[AgentRecord]:
    """The agents that the TOML file declares.

    Raises:
        AgentsFileError: the file cannot be read, is no TOML, has another shape, or names an agent twice.
    """
    try:
        records = msgspec.toml.decode(path.read_bytes(), type=AgentsFile).agent
    except OSError as error:
        raise AgentsFileError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AgentsFileError(f"{path}: {error}") from error
    twice = [agent_id for agent_id, count in Counter(record.id for record in records).items() if count > 1]
    if twice:
        raise AgentsFileError(f"{path}: agent {twice[0]!r} is declared twice")
    return records


def find_record(agent_id: str, records: Sequence[AgentRecord]) -> AgentRecord:
    """The record of that id among the built-in agents and these, which win.

    Raises:
        UnknownAgentError: there is none; the text names those there are.
    """
    known = {record.id: record for record in (*BUILT_IN_AGENTS, *records)}
    if agent_id not in known:
        raise UnknownAgentError(f"there is no agent {agent_id!r}; there are: {', '.join(known)}")
    return known[agent_id]


def build_agents(
    records: list[AgentRecord], environment: Mapping[str, str], client: httpx.AsyncClient
) -> dict[str, BasicAgent]:
    """The built-in agents and these, by id; a record may take a built-in's place.

    Raises:
        AgentsFileError: a record's provider cannot be made (unknown, or its key is missing); the text names both.
    """
    agents = {}
    for record in (*BUILT_IN_AGENTS, *records):
        try:
            agents[record.id] = build_agent(record, environment, client)
        except ProviderConfigError as error:
            raise AgentsFileError(f"agent {record.id!r}: {error}") from error
    return agents


def build_agent(record: AgentRecord, environment: Mapping[str, str], client: httpx.AsyncClient) -> BasicAgent:
    """The agent of one record. Raises ``ProviderConfigError``."""
    return BasicAgent(
        agent_id=record.id,
        name=record.name,
        instructions=record.system,
        provider=create_provider(record.llm_config, environment, client),
        model=default_model(record.llm_config),
        temperature=record.llm_config.temperature,
        max_tokens=record.llm_config.max_tokens,
        deadlines=record.deadlines,
        streaming=record.stream,
    )
