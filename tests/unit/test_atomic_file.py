"""Files are replaced in one step."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from graft.kernel.atomic_file import write_atomically


def test_a_file_is_made_and_replaced_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for data, mode in ((b"first", 0o600), (b"second", 0o644)):
        write_atomically(path, data, mode)
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_that_has_the_old_file_open_still_reads_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"


def test_a_write_that_fails_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fchmod", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_that_a_killed_process_left_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"unchanged")
    (tmp_path / f".record.json.{os.getpid()}").symlink_to(elsewhere)
    write_atomically(path, b"new")
    assert (path.read_bytes(), elsewhere.read_bytes()) == (b"new", b"unchanged")
