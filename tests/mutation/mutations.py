"""Deliberate breaks of the code, as data: what a test must notice. Read from the tables beside this file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[2]
TABLES = ("engine.toml", "server.toml", "providers.toml")


class Mutation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One break.

    Attributes:
        name: what goes wrong, in the field's words.
        file: where, from the root of the checkout.
        old, new: the text there, which occurs exactly once, and what takes its place.
        tests: what is expected to catch it: test modules, few, so that it takes seconds.
        simulation: how many seeds of the simulation are to catch it as well; 0 for none. Nothing reads it yet.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    simulation: int = 0

    def apply(self, text: str) -> str:
        """The file's text with the break in it.

        Raises:
            ValueError: the old text is not there exactly once, or the new one changes nothing.
            SyntaxError: what comes out is no Python.
        """
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the old text is in {self.file} {times} times, not once")
        if self.old == self.new:
            raise ValueError(f"{self.name}: the new text is the old one")
        mutated = text.replace(self.old, self.new)
        compile(mutated, self.file, "exec")
        return mutated


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    mutation: list[Mutation]


def load_mutations() -> list[Mutation]:
    """All of them, in the order of the tables."""
    here = Path(__file__).parent
    tables = [msgspec.convert(tomllib.loads((here / name).read_text()), _Table) for name in TABLES]
    return [mutation for table in tables for mutation in table.mutation]
