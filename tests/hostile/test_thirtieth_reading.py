"""What the thirtieth reading found: where systemd does not answer, whoever makes a cgroup was the unit of any name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.hostile.conftest import graft_without
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import Host
from tests.support.shell import run

pytestmark = pytest.mark.e2e

USER = 65534
TAKES_THE_NAME = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.mkdir(sys.argv[1])
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("without", ["", "units of systemd's"], ids=["", "control"])
@pytest.mark.parametrize("prefix", ["", "unit:"])
def test_a_cgroup_that_a_user_made_is_no_unit(host: Host, tmp_path: Path, prefix: str, without: str) -> None:
    name, file = f"grafttest-{os.getpid()}.service", tmp_path / "web.yaml"
    file.write_text("name: web\ndefault: deny\n")
    with new_cgroup("user") as mine:
        for path in (mine, mine / "cgroup.procs", mine / "cgroup.subtree_control"):
            os.chown(path, USER, USER)
        evil = host.start_command([*in_cgroup(mine), sys.executable, "-c", TAKES_THE_NAME, mine / name], talk=True)
        evil.says("ready")
        words = [*graft_without(without), "attach", "--cgroup", f"{prefix}{name}", "--policy", file]
        done = run(words, environment={**host.environment, "PATH": "/nowhere"})  # and no systemctl in it
        if without:
            assert done.returncode == 0, done
            host.remove_at(mine / name)
        else:
            assert done.returncode == 3 and "systemd does not answer" in done.stderr
        evil.tell("\n")
        evil.wait()
        (mine / name).rmdir()
