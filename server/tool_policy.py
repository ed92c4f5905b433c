"""Which tools an agent may name that came through the API: what tools can do is done with the operator's rights.

A tool of an MCP server or a plugin reads and writes as the server's own user, whoever asks. The local user and the
agents file are the operator's own word and name any tool. With keys, a record names built-in tools alone, and what the
operator allows beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from engine.builtin_tools import BUILT_IN_TOOLS

from .errors import ApiError
from .principal import Principal
from .records import AgentRecord

_ALLOWED = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.\S+)?")


class ToolPolicy(msgspec.Struct, frozen=True):
    """What the operator allows to all tenants beside the built-in tools.

    Attributes:
        names: a plugin's tool (``weather``), one of a source (``files.read``), or all of a source (``files.*``).
    """

    names: frozenset[str] = frozenset()

    @classmethod
    def allowing(cls, names: Iterable[str] = ()) -> ToolPolicy:
        """The policy of ``--allow-tool``.

        Raises:
            ValueError: what can be no tool's name; the text says which.
        """
        allowed = frozenset(names)
        for name in allowed:
            if not _ALLOWED.fullmatch(name):
                raise ValueError(f"{name[:100]!r} is not the name of a tool, as weather, files.read or files.*")
        return cls(allowed)

    def refused(self, principal: Principal, names: Iterable[str]) -> list[str]:
        """Which of these tools an agent of this principal may not have."""
        return [] if principal.operator else [name for name in names if not self._allows(name)]

    def _allows(self, name: str) -> bool:
        source, dot, _ = name.partition(".")
        return name in BUILT_IN_TOOLS or name in self.names or (bool(dot) and f"{source}.*" in self.names)


def check_tools(record: AgentRecord, principal: Principal, policy: ToolPolicy) -> None:
    """Refuse a record that names a tool which this principal may not give an agent. It is not said which there are.

    Raises:
        ApiError: 403, naming the field.
    """
    if refused := policy.refused(principal, record.tools):
        message = (
            f"tools: {refused[0][:200]!r} is no built-in tool, and none that the operator allows "
            "(lumos serve --allow-tool); GET /api/v1/tools lists what there is for you"
        )
        raise ApiError(403, "FORBIDDEN", message, {"field": "tools"})
