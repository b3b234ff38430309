"""The tests that documents name as evidence exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted((PROJECT_ROOT / "docs").glob("*.md"))
_REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_PATH = re.compile(r"`(tests/[\w/.]+)`")


def functions_in(path: Path) -> set[str]:
    """Names of the test functions a file defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [
        f"{path}::{name}"
        for path, name in _REFERENCE.findall(text)
        if not (PROJECT_ROOT / path).is_file() or name not in functions_in(PROJECT_ROOT / path)
    ]
    missing += [path for path in _PATH.findall(text) if not (PROJECT_ROOT / path).exists()]
    assert not missing, f"{document.name} names tests that do not exist: {missing}"


def test_guarantees_faults_and_traps_name_a_test_in_every_row() -> None:
    for name in ("guarantees.md", "faults.md", "traps.md"):
        text = (PROJECT_ROOT / "docs" / name).read_text(encoding="utf-8")
        first_table = text.split("|---|", 1)[1].split("\n\n", 1)[0]
        rows = first_table.splitlines()[1:]
        assert rows, f"{name} has no table"
        without = [row for row in rows if not _REFERENCE.search(row)]
        assert not without, f"{name} has rows without a test: {without}"
