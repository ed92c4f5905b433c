"""Reads Google-style docstrings: what a function does, and what its parameters mean."""

from __future__ import annotations

import inspect
import re

_ARGUMENTS = re.compile(r"(?:Args|Arguments|Parameters):\s*")
_UNTOLD = re.compile(r"(?:Raises|Yields|Attributes|Todo|References|See Also):\s*")
_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def read_docstring(docstring: str | None) -> tuple[str, dict[str, str]]:
    """What a model should read of a docstring: the text, and the description of each parameter in it.

    The sections about exceptions and the like are left out; ``Returns:`` and any other stay in the text.
    """
    text: list[str] = []
    arguments: list[str] = []
    target: list[str] | None = text
    for line in inspect.cleandoc(docstring or "").splitlines():
        if _ARGUMENTS.fullmatch(line):
            target = arguments
            continue
        if _UNTOLD.fullmatch(line):
            target = None
        elif line and not line[0].isspace() and target is not text:
            target = text
        if target is not None:
            target.append(line)
    return _joined(text), _entries(arguments)


def _entries(lines: list[str]) -> dict[str, str]:
    """Descriptions by name; a line that is indented deeper than an entry's first goes on with it."""
    entries: dict[str, list[str]] = {}
    name: str | None = None
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        entry = _ENTRY.fullmatch(line.strip()) if line[margin : margin + 1].strip() else None
        if entry:
            name = entry[1]
            entries[name] = [entry[2]]
        elif name is not None:
            entries[name].append(line.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in entries.items()}


def _joined(lines: list[str]) -> str:
    """The lines with those of one paragraph joined; indented ones (lists, examples) stay lines."""
    text = "\n".join(lines).strip()
    text = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"(?<=\S)\n(?=[^\s*\-\d])", " ", text)
