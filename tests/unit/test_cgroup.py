"""cgroup v2 of all kinds of machines: its mount, and cgroups with any name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graft.errors import KernelError
from graft.kernel import cgroup

PURE = b"""\
22 27 0:20 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
28 21 0:24 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""
HYBRID = b"""\
30 23 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime shared:10 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
"""
V1 = b"""\
32 30 0:28 / /sys/fs/cgroup/memory rw,nosuid shared:11 - cgroup cgroup rw,memory
40 30 0:28 / /mnt/cgroup2 rw - tmpfs cgroup2 rw
"""


def test_a_machine_with_version_2_alone() -> None:
    assert cgroup.parse_mounts(PURE) == Path("/sys/fs/cgroup")


def test_a_machine_with_both_versions() -> None:
    assert cgroup.parse_mounts(HYBRID) == Path("/sys/fs/cgroup/unified")


def test_a_machine_without_version_2_gets_a_hint() -> None:
    with pytest.raises(KernelError) as caught:
        cgroup.parse_mounts(V1)
    assert caught.value.hint is not None and "mount -t cgroup2" in caught.value.hint


def test_a_mount_point_with_a_space_and_no_optional_fields() -> None:
    line = rb"28 21 0:24 / /mnt/a\040b rw,relatime - cgroup2 none rw"
    assert cgroup.parse_mounts(line) == Path("/mnt/a b")


def test_a_removed_cgroup_has_no_processes() -> None:
    gone = Path("/nonexistent/cgroup")
    assert cgroup.processes(gone) == []
    assert not cgroup.populated(gone)


def test_a_mount_that_a_user_named_is_no_cgroup() -> None:
    fuse = b"50 23 0:50 / /home/eve/\xff\x0c1\x0c rw - fuse.x x\x0c1 2 3 / /evil rw\\040-\\040cgroup2 rw\n"
    assert cgroup.parse_mounts(fuse + PURE) == Path("/sys/fs/cgroup")


def test_a_mount_point_of_any_bytes_is_found_again() -> None:
    line = b"28 21 0:24 / /mnt/\xc3\xa9\xff\\134 rw - cgroup2 none rw"
    assert os.fsencode(cgroup.parse_mounts(line)) == b"/mnt/\xc3\xa9\xff\\"


@pytest.mark.parametrize("line", [b"- cgroup2", b"1 2 3 - cgroup2 x", b" - cgroup2 - cgroup2", b"\0" * 100])
def test_a_malformed_line_is_skipped(line: bytes) -> None:
    assert cgroup.parse_mounts(line + b"\n" + PURE) == Path("/sys/fs/cgroup")


@pytest.mark.parametrize("between", [b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\xc2\x85", b"\xe2\x80\xa8", b"\r"])
def test_a_name_of_version_1_is_not_taken_for_a_cgroup_of_version_2(between: bytes) -> None:
    text = b"3:memory:/eve/x" + between + b"0::/system.slice/other.service\n0::/eve\n"
    assert cgroup.parse_membership(text) == "eve"


@pytest.mark.parametrize("name", ["a b ", " ", "x\x0cy", "\udcff", "a:0::b", "(deleted)"])
def test_a_cgroup_of_any_name_is_found_whole(name: str) -> None:
    assert cgroup.parse_membership(b"0::/eve/" + os.fsencode(name) + b"\n") == f"eve/{name}"


def test_a_process_outside_of_version_2_has_no_cgroup() -> None:
    assert cgroup.parse_membership(b"3:memory:/a\n") is None


def test_cgroups_nested_a_thousand_deep_are_listed(tmp_path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(tmp_path)
        for _ in range(1200):
            os.mkdir("a")
            os.chdir("a")
    finally:
        os.fchdir(here)
        os.close(here)
    found = list(cgroup.tree(tmp_path))
    assert len(found) == 1201
    assert found[0] == tmp_path and found[-1].is_relative_to(found[-2])
    assert cgroup.processes(tmp_path) == []
    cgroup.remove(tmp_path)
    assert not tmp_path.exists()


def test_cgroups_too_deep_for_a_path_are_left_out(tmp_path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    name = "x" * 255
    try:
        os.chdir(tmp_path)
        for _ in range(20):
            os.mkdir(name)
            os.chdir(name)
        assert 10 < len(list(cgroup.tree(tmp_path))) < 20
        for _ in range(20):
            os.chdir("..")
            os.rmdir(name)
    finally:
        os.fchdir(here)
        os.close(here)


def test_controllers_that_the_parent_has_are_enabled_for_both_levels(tmp_path: Path) -> None:
    folder = tmp_path / "graft" / "supervisors"
    folder.mkdir(parents=True)
    for one in (folder.parent, folder):
        (one / "cgroup.controllers").write_text("pids memory\n")
        (one / "cgroup.subtree_control").write_text("")
    cgroup.enable_controllers(folder, ["memory", "cpu"])
    assert (folder.parent / "cgroup.subtree_control").read_text() == "+memory"
    assert (folder / "cgroup.subtree_control").read_text() == "+memory"
