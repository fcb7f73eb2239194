"""What the twenty-ninth reading found: a NUL in an annotation, of which crun (in C) sees only what is before it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.hostile.test_sixth_reading_images import _controllers_kept
from tests.hostile.test_twenty_first_reading import sealed, started
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host

pytestmark = pytest.mark.e2e

__all__ = ["sealed"]

OUT = f"out-{os.getpid()}"


@pytest.mark.parametrize("undefended", [False, True], ids=["", "control: crun alone"])
def test_an_image_does_not_leave_its_cgroup_by_what_is_behind_a_nul(
    host: Host, tmp_path: Path, sealed: Path, undefended: bool
) -> None:
    with _controllers_kept(), new_cgroup("images") as parent:
        host.graft("attach", "--cgroup", parent, "--policy", sealed)
        leaving = started(
            host, tmp_path / "leaving", parent, {"run.oci.delegate-cgroup\0x": f"../../{OUT}"}, undefended
        )
        host.remove_at(parent)
    for folder in (cgroup.v2_mount() / OUT, parent.parent / OUT):
        if folder.exists():
            folder.rmdir()
    if undefended:
        assert leaving.stdout.splitlines()[-1:] == ["listens"], leaving
    else:
        assert leaving.returncode and "has a NUL" in leaving.stderr
