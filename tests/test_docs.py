"""The examples under ``docs/`` do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.events import EVENT_TYPES
from providers.recording import load
from tests.harness.pytest_session import BOTH, run_pytest

TEN_LINES = Path(__file__).parents[1] / "docs" / "ten_lines.py"
TESTING = TEN_LINES.parent / "testing.md"


def test_the_ten_lines_stream_the_recorded_answer() -> None:
    run = subprocess.run([sys.executable, TEN_LINES], capture_output=True, timeout=50, check=True)
    assert run.stdout.decode() == load("gpt4o-short").text
    assert run.stderr == b""


def test_they_are_ten() -> None:
    code = [line for line in TEN_LINES.read_text().splitlines() if line and not re.match(r'#|"""|import|from', line)]
    assert len(code) <= 10


def test_the_variant_in_their_comment_makes_an_openai_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    script = TEN_LINES.read_text()
    imports = re.findall(r"`(import \S+|from \S+ import \S+)`", script)
    variant = re.findall(r"^# (agent = .*)$", script, re.MULTILINE)
    assert imports
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", "sk-fake")
    names: dict[str, Any] = {}
    exec("\n".join([*imports, script.replace("trio.run(main)", ""), *variant]), names)
    request = names["agent"].run_spec("Hi").request
    assert (names["agent"].provider.name, request.model) == ("openai", "gpt-4o")


def test_the_readme_shows_the_ten_lines_as_they_are() -> None:
    code = TEN_LINES.read_text().partition('"""\n')[2].strip()
    assert code in (TEN_LINES.parents[1] / "README.md").read_text()


def test_the_page_of_the_api_names_every_field_of_every_event() -> None:
    page = (TEN_LINES.parent / "http.md").read_text().partition("## Frames")[2]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for kind in EVENT_TYPES:
        row = next(row for row in rows if f"`{kind.__struct_config__.tag}`" in row.split("|")[1])
        assert [field for field in kind.__struct_fields__ if f"`{field}`" not in row] == []


def test_the_page_of_testing_shows_tests_that_pass(tmp_path: Path) -> None:
    """Each block begins with the name of its file; all together are one suite."""
    blocks = re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", TESTING.read_text(), re.MULTILINE | re.DOTALL)
    for name, code in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    tests = sum(code.count("async def test_") for _, code in blocks)
    said = run_pytest(tmp_path, *BOTH)
    assert f"= {tests} passed in" in said, said


def test_no_block_of_the_page_of_testing_is_left_out() -> None:
    openings = re.findall(r"^```(\w+)\n(.*)$", TESTING.read_text(), re.MULTILINE)
    assert len(openings) >= 9
    assert [first for _, first in openings if not re.fullmatch(r"# \S+\.(py|toml)", first)] == []
