"""The cache of what was compiled: when it is used, when not, and what it keeps. The compiler is a stand-in here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from graft.datapath import compile_cache
from graft.datapath.bytecode import Bytecode
from graft.datapath.compile_cache import compile_cached
from graft.datapath.sources import BpfSources

NAMES = ("one.c",)


class Compiler:
    """Counts what is compiled, from sources of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources, self.count = folder / "bpf", 0
        (self.sources / "include").mkdir(parents=True)
        self.cache = folder / "cache"
        for name in ("one.c", "graft.h", "include/types.h"):
            (self.sources / name).write_text(name)
        monkeypatch.setattr("graft.datapath.sources.bpf_source_dir", lambda: self.sources)
        monkeypatch.setattr(compile_cache, "compile_text", self._compile)

    def _compile(self, sources: BpfSources, names: Sequence[str], constants: Mapping[str, int]) -> Bytecode:
        self.count += 1
        return Bytecode({}, {"number": b"%d" % self.count})

    def ask(self, **constants: int) -> int:
        """Which compilation comes out, by its number."""
        return int(compile_cached(self.cache, BpfSources.read(), NAMES, constants).programs["number"])

    @property
    def file(self) -> Path:
        """The one that is in the cache."""
        [found] = self.cache.iterdir()
        return found


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(tmp_path, monkeypatch)


def test_the_same_is_compiled_once(compiler: Compiler) -> None:
    assert [compiler.ask(A=1), compiler.ask(A=1)] == [1, 1]
    assert compiler.cache.stat().st_mode & 0o777 == 0o700
    assert compiler.file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["one.c", "graft.h", "include/types.h"])
def test_another_text_is_another_compilation(compiler: Compiler, name: str) -> None:
    compiler.ask()
    (compiler.sources / name).write_text("another")
    assert compiler.ask() == 2


def test_so_is_one_with_other_constants_or_for_another_architecture(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [compiler.ask(), compiler.ask(A=1), compiler.ask(A=2)] == [1, 2, 3]
    monkeypatch.setenv("ARCH", "arm64")
    assert compiler.ask() == 4


def test_so_is_one_by_another_compiler_or_kernel(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.ask()
    monkeypatch.setattr(compile_cache, "_compiler", lambda: "another")
    assert compiler.ask() == 2
    other = os.uname_result(("Linux", "here", "6.1.0-999", "#1", os.uname().machine))
    monkeypatch.setattr(os, "uname", lambda: other)
    assert compiler.ask() == 3


def test_without_a_folder_nothing_is_kept(compiler: Compiler) -> None:
    for number in (1, 2):
        assert compile_cached(None, BpfSources.read(), NAMES, {}).programs["number"] == b"%d" % number


def test_a_damaged_file_is_compiled_anew_and_replaced(compiler: Compiler) -> None:
    compiler.ask()
    compiler.file.write_bytes(compiler.file.read_bytes()[:-1])
    assert [compiler.ask(), compiler.ask()] == [2, 2]


def test_a_file_that_others_can_write_does_not_count(compiler: Compiler) -> None:
    compiler.ask()
    compiler.file.chmod(0o606)
    assert [compiler.ask(), compiler.ask()] == [2, 2]
    assert compiler.file.stat().st_mode & 0o777 == 0o600


def test_nor_one_in_a_folder_that_others_can_write(compiler: Compiler) -> None:
    compiler.ask()
    compiler.cache.chmod(0o777)
    assert [compiler.ask(), compiler.ask()] == [2, 3]


def test_nor_a_symbolic_link(compiler: Compiler, tmp_path: Path) -> None:
    compiler.ask()
    path = compiler.file
    path.symlink_to(path.rename(tmp_path / "elsewhere"))
    assert compiler.ask() == 2
    assert not compiler.file.is_symlink()


def test_a_folder_that_cannot_be_made_costs_time_only(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    compiler.cache = tmp_path / "file" / "cache"
    assert [compiler.ask(), compiler.ask()] == [1, 2]


def test_what_was_used_last_stays(compiler: Compiler) -> None:
    compiler.ask(A=0)
    (compiler.cache / "another's").touch()
    for number in range(1, 40):
        compiler.ask(A=number)
        assert compiler.ask(A=0) == 1
    assert (compiler.cache / "another's").exists()
    assert len(list(compiler.cache.iterdir())) == 16 + 1
    assert compiler.ask(A=1) == 41
