"""Where cgroup v2 is mounted, on machines of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.errors import KernelError
from graft.kernel import cgroup

PURE = """\
22 27 0:20 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
28 21 0:24 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""
HYBRID = """\
30 23 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime shared:10 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
"""
V1 = """\
32 30 0:28 / /sys/fs/cgroup/memory rw,nosuid shared:11 - cgroup cgroup rw,memory
40 30 0:28 / /mnt/cgroup2 rw - tmpfs cgroup2 rw
"""


def test_a_machine_with_version_2_alone() -> None:
    assert cgroup.v2_mount(PURE) == Path("/sys/fs/cgroup")


def test_a_machine_with_both_versions() -> None:
    assert cgroup.v2_mount(HYBRID) == Path("/sys/fs/cgroup/unified")


def test_a_machine_without_version_2_is_told_what_to_do() -> None:
    with pytest.raises(KernelError) as caught:
        cgroup.v2_mount(V1)
    assert caught.value.hint is not None and "mount -t cgroup2" in caught.value.hint


def test_a_mount_point_with_a_space_and_no_optional_fields() -> None:
    line = r"28 21 0:24 / /mnt/a\040b rw,relatime - cgroup2 none rw"
    assert cgroup.v2_mount(line) == Path("/mnt/a b")


def test_a_cgroup_that_is_gone_has_no_processes() -> None:
    gone = Path("/nonexistent/cgroup")
    assert cgroup.processes(gone) == []
    assert not cgroup.populated(gone)
