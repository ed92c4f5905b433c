"""What ``engine`` exports, which of it is loaded when, and that its table, its imports and ``__all__`` say the same."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import engine

TABLE = {module: names.split() for module, names in engine._NAMES.items()}
ROOT = Path(__file__).parents[2]


def for_checkers() -> dict[str, list[str]]:
    """What ``engine`` imports where only type checkers look: each submodule's names."""
    statements = ast.parse(Path(engine.__file__).read_text()).body
    [block] = [each for each in statements if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING"]
    imports = [each for each in block.body if isinstance(each, ast.ImportFrom) and each.level == 1]
    assert len(imports) == len(block.body)
    return {str(each.module): [alias.name for alias in each.names] for each in imports}


def loaded_by(statement: str) -> set[str]:
    """``sys.modules`` of a fresh interpreter after the statement."""
    command = [sys.executable, "-c", f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_table_imports_and_all_name_the_same() -> None:
    assert for_checkers() == TABLE
    named = [name for names in TABLE.values() for name in names]
    assert sorted(named) == sorted(engine.__all__)
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("module", TABLE)
def test_each_name_is_its_submodules_own_object_and_looked_up_once(module: str) -> None:
    for name in TABLE[module]:
        found = getattr(engine, name)
        assert found is getattr(import_module(f"engine.{module}"), name)
        assert vars(engine)[name] is found


@pytest.mark.parametrize("module", TABLE)
def test_a_submodule_is_there_without_an_import_of_its_own(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = import_module(f"engine.{module}")
    monkeypatch.delattr(engine, module)
    assert getattr(engine, module) is loaded


def test_the_package_alone_loads_nothing_of_its_own_nor_of_others() -> None:
    loaded = loaded_by("import engine") - loaded_by("pass")
    assert not loaded & {"msgspec", "trio", "typing"}
    assert [name for name in loaded if name.startswith("engine")] == ["engine"]


@pytest.mark.parametrize(
    "statement",
    [
        "from engine.events import TextDelta",
        "from engine import TextDelta",
        "from engine import Event, Piece, ErrorCode",
        "import engine; engine.TextDelta",
        "import engine; engine.events.TextDelta",
    ],
)
def test_events_are_loaded_without_trio(statement: str) -> None:
    loaded = loaded_by(statement)
    assert loaded >= {"engine.events", "msgspec"}
    assert "trio" not in loaded


def test_an_agent_loads_all_that_it_runs_with() -> None:
    assert loaded_by("from engine import StreamingAgent") >= {"engine.run", "msgspec", "trio"}


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match=r"^module 'engine' has no attribute 'nonsense'$"):
        _ = engine.nonsense  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'engine'"):
        exec("from engine import nonsense")


def test_dir_has_the_names_before_they_are_loaded() -> None:
    assert dir(engine) == sorted(engine.__all__)
    assert not loaded_by("import engine; assert 'StreamingAgent' in dir(engine)") & {"trio", "msgspec"}
