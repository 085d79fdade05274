"""The table of complaints names tests that exist; two of them, small enough, are here."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from holdfast.launch.cli import main

_ROOT = Path(__file__).parents[2]
_ROWS = re.findall(r"^\| (\d+) \|(.*)\|$", (_ROOT / "docs" / "complaints.md").read_text(encoding="utf-8"), re.MULTILINE)
_PICKLE = re.compile(r"pickle|dill|shelve|joblib|marshal")


@cache
def _tests_in(path: str) -> frozenset[str]:
    tree = ast.parse((_ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_there_are_twenty() -> None:
    assert [int(number) for number, _ in _ROWS] == list(range(1, 21))


@pytest.mark.parametrize("row", [row for _, row in _ROWS], ids=[number for number, _ in _ROWS])
def test_each_complaint_is_answered_by_tests_that_exist(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
    assert named, "no test is named"
    assert [name for path, name in named if name not in _tests_in(path)] == []


def test_nothing_reads_or_writes_a_pickle() -> None:
    found = []
    for path in (_ROOT / "holdfast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            is_torch = isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load")
            if is_torch or any(_PICKLE.search(name) for name in names):
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_composing_makes_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    assert main(["train", "experiment=demo", "--cfg", "job"]) == 0
    assert "max_steps" in capsys.readouterr().out and not list(tmp_path.iterdir())
