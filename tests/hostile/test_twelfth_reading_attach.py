"""What a twelfth reading found about `graft attach`: what a container's processes lend nobody, or let nobody list."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import holder, running
from tests.support.building import SOURCES, Programs
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.shell import AS_NOBODY, Word, run

pytestmark = pytest.mark.e2e

PYTHON = "/usr/bin/python3"
BEFORE = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("0.0.0.0", int(sys.argv[1])))
tcp = socket.create_connection((sys.argv[2], int(sys.argv[3])))
print("ready", flush=True)
tcp.recv(1)
"""


@contextlib.contextmanager
def in_cgroup(host: Host, path: Path, *words: Word) -> Iterator[subprocess.Popen[str]]:
    """A program on the host, in that cgroup."""
    with running(
        ["sh", "-c", f'echo $$ > {path}/cgroup.procs; exec "$@"', "sh", *host.netns.command(*words)]
    ) as program:
        yield program


def attach(host: Host, path: Path, without: str = "") -> str:
    """What `graft attach` says, when it has put the cgroup under a policy that grants nothing."""
    command = [*graft_without(without), "attach", "--cgroup", path, "--deny"]
    said = run(command, environment=host.environment, status=0, timeout=100).stdout
    host.remove_at(path)
    return said


# ---- a process that lets nobody list its descriptors -----------------------------------------------------------------


def said_beside_a_holder(host: Host, without: str = "") -> tuple[str, list[str]]:
    """What `attach` says of a container one process of which holds its folder in /proc, and the sockets of another."""
    udp, tcp = host.port(), host.port()
    with new_cgroup("before") as path, host.client.listener(CLIENT4, tcp):
        words = (*AS_NOBODY, PYTHON, "-ISc", BEFORE, udp, CLIENT4, tcp)
        with in_cgroup(host, path, *words), in_cgroup(host, path, *holder("self")):
            return attach(host, path, without), [f"udp unconnected 0.0.0.0:{udp}", f"with {CLIENT4}:{tcp}"]


def test_one_process_hides_no_sockets_of_the_others(host: Host) -> None:
    said, sockets = said_beside_a_holder(host)
    assert [one for one in sockets if one not in said] == []
    assert "does not let its sockets be listed in time: there may be more" in said


def test_control_where_all_are_searched_at_once_it_hides_them(host: Host) -> None:
    said, sockets = said_beside_a_holder(host, "search")
    assert [one for one in sockets if one in said] == []


# ---- processes that lend their listeners one after the other ---------------------------------------------------------


@pytest.fixture
def fuse(root: None, tmp_path: Path) -> Iterator[Path]:
    """/dev/fuse as most hosts have it: open to all."""
    number = Path("/dev/fuse").stat().st_rdev
    with contextlib.ExitStack() as stack:
        folder = Path(f"/tmp/graft-fuse-{os.getpid()}")
        folder.mkdir(mode=0o755)
        stack.callback(run, ["rm", "-rf", folder])
        node = folder / "fuse"
        os.mknod(node, stat.S_IFCHR | 0o666, number)
        node.chmod(0o666)
        (folder / "mount").mkdir()
        os.chown(folder / "mount", 65534, 65534)
        yield folder


def said_beside_lenders(host: Host, programs: Programs, fuse: Path, without: str = "") -> str:
    with new_cgroup("lenders") as path:
        hold = (
            *AS_NOBODY,
            PYTHON,
            "-c",
            (SOURCES / "hold_exec.py").read_text(),
            programs["execing"],
            fuse / "fuse",
            fuse / "mount",
            3,
            "1.7",
        )
        with in_cgroup(host, path, *hold):
            said = attach(host, path, without)
            cgroup.kill(path)
        return said


def test_the_installations_lock_is_not_held_for_what_a_process_does_not_lend(
    host: Host, programs: Programs, fuse: Path
) -> None:
    assert said_beside_lenders(host, programs, fuse).count("may receive nothing: no process lends it") == 3


def test_control_where_it_waits_under_the_lock_it_gets_them(host: Host, programs: Programs, fuse: Path) -> None:
    assert "may receive nothing" not in said_beside_lenders(host, programs, fuse, "under the lock")
