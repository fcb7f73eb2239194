"""Test files that documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_test_files_that_a_document_names_exist(document: Path) -> None:
    found = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    for folder, name in re.findall(r"(tests/[\w/]+/)?(test_\w+\.py)", document.read_text()):
        assert name in found
        assert not folder or (ROOT / folder / name).exists(), f"{name} is in {found[name].parent}"
