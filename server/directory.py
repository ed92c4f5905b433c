"""Who may use which agent: the operator's, which are everybody's, and those that a tenant has stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from sqlalchemy import Connection

from .agents import BUILT_IN_AGENTS
from .principal import Principal
from .records import AgentRecord
from .store import agents
from .store.database import Database
from .store.rows import StoredAgent

ListedAgent: TypeAlias = AgentRecord | StoredAgent
"""An ``AgentRecord`` is the operator's: in the program or the agents file, and no API changes it."""


class AgentDirectory:
    """Finds agents for whoever asks. The operator's win over a stored one of the same id; the API refuses to make such.

    Closes nothing. Without a database there are the operator's agents alone.
    """

    def __init__(self, declared: Sequence[AgentRecord], database: Database | None) -> None:
        """``declared`` are those of the agents file, which may take a built-in's place."""
        self._operators = {record.id: record for record in (*BUILT_IN_AGENTS, *declared)}
        self._database = database

    def is_operators(self, agent_id: str) -> bool:
        """Whether the id is that of an agent of the operator's, so that no tenant may take it."""
        return agent_id in self._operators

    def operators(self) -> tuple[AgentRecord, ...]:
        """The operator's agents: those that are built in, then the file's."""
        return tuple(self._operators.values())

    def find_operators(self, agent_id: str) -> AgentRecord | None:
        """The operator's agent of that id: what ``find`` finds first, without waiting."""
        return self._operators.get(agent_id)

    async def find(self, principal: Principal, agent_id: str) -> ListedAgent | None:
        """The agent of that id, if it is one that this principal may use: another user's or tenant's is not there.

        Raises:
            StoreUnavailableError: the store cannot answer.
        """
        if agent_id in self._operators:
            return self._operators[agent_id]
        if self._database is None:
            return None
        stored = await self._database.read(agents.find_agent, principal.tenant_id, agent_id)
        return stored if stored is not None and may_use(principal, stored) else None

    async def list(self, principal: Principal, limit: int, offset: int) -> tuple[Sequence[ListedAgent], int]:
        """One page of the agents that this principal may use, and how many there are: the operator's come first.

        Raises:
            StoreUnavailableError: the store cannot answer.
        """
        first: Sequence[ListedAgent] = self.operators()[offset:][:limit]
        if self._database is None:
            return first, len(self._operators)
        skipped = max(0, offset - len(self._operators))
        stored, count = await self._database.read(self._page, principal, limit - len(first), skipped)
        return [*first, *stored], len(self._operators) + count

    def _page(
        self, connection: Connection, principal: Principal, limit: int, offset: int
    ) -> tuple[Sequence[StoredAgent], int]:
        """Stored ones without those that an agents file has come to hide: few, so the others are read and left out."""
        tenant_id, user_id = principal.tenant_id, None if principal.admin else principal.user_id
        found = (agents.find_agent(connection, tenant_id, agent_id) for agent_id in self._operators)
        hidden = sum(1 for agent in found if agent is not None and may_use(principal, agent))
        count = agents.count_agents(connection, tenant_id, user_id) - hidden
        if not hidden:
            return agents.list_agents(connection, tenant_id, user_id, limit, offset), count
        every = agents.list_agents(connection, tenant_id, user_id, offset + limit + hidden, 0)
        return [agent for agent in every if not self.is_operators(agent.record.id)][offset:][:limit], count


def may_use(principal: Principal, agent: StoredAgent) -> bool:
    """Whether the agent is of this principal's tenant, and for all its users, this one, or the principal an admin."""
    if agent.tenant_id != principal.tenant_id:
        return False
    return principal.admin or agent.user_id is None or agent.user_id == principal.user_id


def may_change(principal: Principal, agent: StoredAgent) -> bool:
    """Whether this principal may change or delete the agent: its user, or an admin of its tenant."""
    return agent.tenant_id == principal.tenant_id and (principal.admin or agent.user_id == principal.user_id)
