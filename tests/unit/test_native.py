"""When graftd's compiled modules are used, and when plain Python is."""

from __future__ import annotations

import ast
import importlib.machinery
import shutil
import sys
from pathlib import Path

import pytest

import graft.splice
from graft.splice import native
from graft.splice.native.sources import MODULES, library

SPLICE = Path(native.__file__).parent.parent
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the modules' sources."""
    for name in MODULES:
        shutil.copy(SPLICE / f"{name}.py", tmp_path)
    return tmp_path


@pytest.fixture
def built(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a build leaves it, for a copy of the sources."""
    folder = sources / "native"
    folder.mkdir()
    monkeypatch.setattr(native, "_FOLDER", folder)
    monkeypatch.delenv(native.NOT_COMPILED, raising=False)
    for name in (*MODULES, library(sources)):
        (folder / f"{name}{SUFFIX}").touch()
    return folder


def test_each_module_exists() -> None:
    assert [name for name in MODULES if not (SPLICE / f"{name}.py").exists()] == []
    assert list(MODULES) == sorted(MODULES)


def test_the_librarys_name_tells_the_sources_whatever_their_folder(sources: Path) -> None:
    assert library(sources) == library(SPLICE)


@pytest.mark.parametrize("name", MODULES)
def test_another_source_has_another_library(sources: Path, name: str) -> None:
    before = library(sources)
    with (sources / f"{name}.py").open("a") as file:
        file.write("\n")
    assert library(sources) != before


def test_what_was_built_from_these_sources_serves(built: Path) -> None:
    assert native.why_not() == ""


def test_where_nothing_was_built_plain_python_serves(built: Path) -> None:
    shutil.rmtree(built)
    assert "no compiler" in native.why_not()


def test_what_was_built_from_other_sources_does_not_serve(built: Path) -> None:
    with (built.parent / "turns.py").open("a") as file:
        file.write("\n")
    assert "another version" in native.why_not()
    assert not native.use()


def test_plain_python_serves_on_request(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.NOT_COMPILED, "1")
    assert native.NOT_COMPILED in native.why_not()


def test_compiled_modules_do_not_join_plain_ones(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graft.splice.turns", sys)
    before = list(graft.splice.__path__)
    assert not native.use()
    assert graft.splice.__path__ == before


def test_a_library_that_does_not_load_leaves_plain_python(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.delitem(sys.modules, f"graft.splice.{name}", raising=False)
    before = list(graft.splice.__path__)
    assert not native.use()  # the file is empty
    assert graft.splice.__path__ == before
    assert library(built.parent) not in sys.modules


def names_of_compiled_classes() -> set[str]:
    """The classes of the compiled modules."""
    trees = [ast.parse((SPLICE / f"{name}.py").read_text()) for name in MODULES]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(
    "path", [path for path in sorted(SPLICE.glob("*.py")) if path.stem not in MODULES], ids=lambda path: path.stem
)
def test_no_plain_class_has_a_compiled_one_as_its_base(path: Path) -> None:
    compiled = names_of_compiled_classes()
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    bases = {base.id for one in classes for base in one.bases if isinstance(base, ast.Name)}
    assert not bases & compiled, "mypyc refuses that when graftd imports it"
