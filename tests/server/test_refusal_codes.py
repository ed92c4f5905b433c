"""The table of refusals in docs/http.md is that of the code: every status with every code, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from server.openapi import STATUSES

ROOT = Path(__file__).parents[2]
OF_SOCKETS = re.compile(r"(api_)?socket(_\w+)?\.py")

FRAMEWORK = {(404, "NOT_FOUND"), (405, "METHOD_NOT_ALLOWED"), (408, "REQUEST_TIMEOUT"), (413, "PAYLOAD_TOO_LARGE")}
"""What Quart refuses by itself, under the names that ``server.errors`` gives it."""


def raised(path: Path) -> Iterator[tuple[int, str]]:
    """Statuses and codes of the ``ApiError`` that a module makes; not those that it passes on."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(
                func=ast.Name(id="ApiError"),
                args=[ast.Constant(value=int(status)), ast.Constant(value=str(code)), *_],
            ):
                yield status, code


def documented() -> set[tuple[int, str]]:
    """The table's rows; a code is in capitals and quoted, before any explanation."""
    section = (ROOT / "docs/http.md").read_text().partition("\n## Refusals\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d{3}) \| (.+) \|$", section, re.MULTILINE)
    return {(int(status), code) for status, text in rows for code in re.findall(r"`([A-Z_]{4,})`", text)}


def test_the_documents_name_every_refusal_of_the_code_and_no_other() -> None:
    modules = [path for path in (ROOT / "server").rglob("*.py") if not OF_SOCKETS.fullmatch(path.name)]
    found = {refusal for path in modules for refusal in raised(path)} | FRAMEWORK
    assert len(found) > 15
    assert documented() == found


def test_the_api_description_and_the_documents_have_the_same_statuses() -> None:
    assert {status for status, _ in documented()} == {*STATUSES, 405}, "405 is of no route"


def test_what_only_sockets_refuse_is_in_their_document() -> None:
    text = (ROOT / "docs/socket.md").read_text()
    modules = [path for path in (ROOT / "server").rglob("*.py") if OF_SOCKETS.fullmatch(path.name)]
    codes = {code for path in modules for _, code in raised(path)} - {code for _, code in documented()}
    assert codes
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []
