"""Limits of a supervisor's memory and CPU time."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.swap.resource_limits import MAX_BYTES, MIN_BYTES, cpu_limit, memory_limit


@pytest.mark.parametrize(
    ("outer", "inner", "limit"),
    [
        ("max 100000", "max 100000", "max"),
        ("200000 100000", "max 100000", "200000 100000"),
        ("200000 100000", "10000 100000", "10000 100000"),
        ("5000 100000", "50000 50000", "5000 100000"),  # the lower one, of the outer cgroup
        ("nonsense", "", "max"),
    ],
)
def test_a_supervisor_has_the_lowest_cpu_limit_of_its_container(
    tmp_path: Path, outer: str, inner: str, limit: str
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text(outer + "\n")
    (folder / "cpu.max").write_text(inner + "\n")
    assert cpu_limit(folder) == limit


@pytest.mark.parametrize(
    ("outer", "inner", "limit"),
    [
        ("max", "max", MAX_BYTES),
        ("300000000", "max", 300000000),
        ("300000000", "200000000", 200000000),
        ("max", "4096", MIN_BYTES),  # a supervisor needs that much
    ],
)
def test_a_supervisor_has_the_memory_limit_of_its_container(tmp_path: Path, outer: str, inner: str, limit: int) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text(outer + "\n")
    (folder / "memory.max").write_text(inner + "\n")
    assert memory_limit(folder) == limit
