"""What kinds of things happened in a world, counted from its trace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from .plan import Plan

_HAPPENED = re.compile(
    r"^\S+ (?:vendor \d+ (?P<refused>refuse|black_hole)$"
    r"|vendor \d+ request .* fault=(?P<upstream>\w+)$"
    r"|tool (?P<tool>\S+) called "
    r"|client\d+ step act=(?P<act>\w+) "
    r"|client\d+ (?P<attack>attacks) "
    r"|world (?P<world>\w+) number=)",
    re.MULTILINE,
)


def kinds_of(plan: Plan, trace: str) -> Counter[str]:
    """How often what happened: ``upstream cut``, ``tool hangs``, ``client stop``, ``world kill`` and so on."""
    manners = {tool.name: tool.manner for tool in plan.tools}
    happened: Counter[str] = Counter()
    for match in _HAPPENED.finditer(trace):
        happened[_kind(match, manners)] += 1
    del happened[""]
    return happened


def _kind(match: re.Match[str], manners: Mapping[str, str]) -> str:
    what = match[match.lastgroup or 0]
    match match.lastgroup:
        case "refused" | "upstream":
            return "" if what == "None" else f"upstream {what}"
        case "tool":
            return f"tool {manners[what]}" if what in manners else ""
        case "world":
            return f"world {what}"
        case _:
            return f"client {what}"
