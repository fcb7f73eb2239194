"""Tests that documents and the guests' list name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CORE = ROOT / "tests/vm/core.txt"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_test_files_that_a_document_names_exist(document: Path) -> None:
    found = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    for folder, name in re.findall(r"(tests/[\w/]+/)?(test_\w+\.py)", document.read_text()):
        assert name in found
        assert not folder or (ROOT / folder / name).exists(), f"{name} is in {found[name].parent}"


def test_the_tests_that_run_in_guests_exist() -> None:
    lines = [line for line in CORE.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        file, _, name = line.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).exists(), line
