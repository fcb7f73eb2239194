"""Files of the repository that documents, docstrings and comments name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = "graft|cli|bpf|tests|docs|examples"
# Not below another folder: kernel/bpf/verifier.c is the kernel's, /etc/graft/runtime.yaml the operator's.
PATH = re.compile(rf"(?<![\w/.$~-])((?:{_FOLDERS})/[\w./-]*\w\.(?:py|c|h|md|json|txt|yaml|service))\b")
FOLDER_OF_TESTS = re.compile(r"(?<![\w/.$~-])(tests/\w+)\b(?![./]\w)")
BARE_NAME = re.compile(r"(?<![\w/.*-])([a-z_0-9]+(?:\.py|\.bpf\.c))\b")


def documents() -> Iterator[Path]:
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    yield from (ROOT / "docs").glob("*.md")
    yield from (ROOT / "examples").rglob("*.md")
    yield from (ROOT / "graft").rglob("*.py")
    yield from (ROOT / "cli").glob("*.py")
    yield from (ROOT / "bpf").glob("*.[ch]")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def names() -> frozenset[str]:
    """The names of all files in these folders."""
    return frozenset(path.name for folder in _FOLDERS.split("|") for path in (ROOT / folder).rglob("*"))


def missing(text: str) -> set[str]:
    paths = {match[1] for pattern in (PATH, FOLDER_OF_TESTS) for match in pattern.finditer(text)}
    bare = {match[1] for match in BARE_NAME.finditer(text)}
    return {path for path in paths if not (ROOT / path).exists()} | (bare - names())


@pytest.mark.parametrize("document", [*documents()], ids=relative)
def test_the_files_that_it_names_exist(document: Path) -> None:
    assert missing(document.read_text()) == set()


@pytest.mark.parametrize("document", [path for path in documents() if path.suffix == ".md"], ids=relative)
def test_its_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize(
    "named",
    ["graft/no/such.py", "bpf/none.bpf.c", "tests/none/test_x.py", "tests/none", "none_such.py", "docs/none.md"],
)
def test_one_that_does_not_exist_is_noticed(named: str) -> None:
    assert missing(f"see `{named}`, or ({named}).") == {named}


@pytest.mark.parametrize("named", ["kernel/bpf/verifier.c", "/etc/graft/runtime.yaml", "graft/supervisors", "web.yaml"])
def test_what_is_not_of_the_repository_is_not_checked(named: str) -> None:
    assert missing(f"see `{named}`.") == set()
