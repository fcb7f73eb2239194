"""Python that Graft starts: as root, in any working directory, whose files may be anybody's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for folder in ("graft", "cli") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file())


def commands(text: str) -> Iterator[list[str]]:
    """Each list and tuple with Python or ``-m`` in it: its words as they are written."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.List | ast.Tuple):
            words = [one.value if isinstance(one, ast.Constant) else ast.unparse(one) for one in node.elts]
            if "sys.executable" in words or "-m" in words:
                yield [str(word) for word in words]


def is_safe(words: list[str]) -> bool:
    """Whether Python leaves the working directory out of where it looks for modules: by -I or -P (python(1)), before
    what it is to run.
    """
    return bool(words) and words[0] in ("sys.executable", "python") and words[1:2] in (["-I"], ["-P"])


def test_python_is_started_without_the_working_directory_on_its_path() -> None:
    found = [(path, words) for path in MODULES for words in commands(path.read_text())]
    assert len(found) >= 3
    assert not [(path, words) for path, words in found if not is_safe(words)]


@pytest.mark.parametrize(
    "text", ['[sys.executable, "-m", "a"]', '(sys.executable, "a.py")', '["python3", "-m", "a"]', '[python, *x, "-m"]']
)
def test_control_it_is_noticed_otherwise(text: str) -> None:
    assert [is_safe(words) for words in commands(text)] == [False]


def test_so_it_is_in_the_examples() -> None:
    lines = [line for path in SCRIPTS for line in path.read_text().splitlines()]
    started = [line for line in lines if re.search(r"\bpython[0-9.]* ", line)]
    assert started
    assert not [line for line in started if not re.search(r"\bpython[0-9.]* -[IP] ", line)]
