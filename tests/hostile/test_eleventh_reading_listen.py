"""What an eleventh reading found: `graft listen` itself waited for the folder of one container that somebody held, and
a container's namespace was found by the id of a process that had ended.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.kernel import netns as namespaces
from graft.swap.socket_pool import NamespaceSwitch
from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import holder, running
from tests.hostile.test_listener import can_connect, container, send
from tests.support.building import Programs
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import Netns
from tests.support.program import Program
from tests.support.wait import until

pytestmark = pytest.mark.e2e


# ---- `graft listen` looks a container up whose folder is held --------------------------------------------------------


def listens_for_two(host: Host, folder: Path, stack: ExitStack, without: str = "") -> Program:
    """`graft listen`, with a container whose cgroup's folder somebody holds, and then another one."""
    (folder / "policy.yaml").write_text("name: p\n")
    (folder / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(folder / "policy.yaml")}}))
    serving = host.start_command([*graft_without(without), "listen"])
    serving.until("graft listen listens", lambda: can_connect(host.settings.run_dir / "listener"))
    cgroups = [stack.enter_context(new_cgroup(name)) for name in ("hostile", "other")]
    found = [stack.enter_context(container(cgroup)) for cgroup in cgroups]
    stack.enter_context(running(holder(cgroups[0])))
    for name, (pid, listener) in zip(("hostile", "other"), found, strict=True):
        send(host, name, pid, folder, [listener])
    return serving


def test_a_container_whose_folder_is_held_delays_no_other(host: Host, tmp_path: Path) -> None:
    with ExitStack() as stack:
        serving = listens_for_two(host, tmp_path, stack)
        serving.says("other: attached")
        assert "hostile: refused, and ended: somebody holds the directory of the cgroup" in serving.said


def test_control_where_graft_listen_looks_itself_it_waits_and_cannot_be_killed(host: Host, tmp_path: Path) -> None:
    with ExitStack() as stack:
        serving = listens_for_two(host, tmp_path, stack, "found apart")
        stat = Path(f"/proc/{serving.process.pid}/stat")
        until("it waits", lambda: stat.read_text().rpartition(")")[2].split()[0] == "D")
        serving.process.kill()
        assert serving.process.poll() is None
        assert "attached" not in serving.said
    serving.process.wait(30)


# ---- the id of a process that has ended ------------------------------------------------------------------------------


def opened_inside(
    host: Host, programs: Programs, inside: Netns, opening: Callable[[NamespaceSwitch, int], int]
) -> tuple[int, int]:
    """The cookie of the namespace that a supervisor opens as a container's, and an error: the container's process ends
    when it was found, and a process of the host's gets its id.
    """
    program = host.start_command(inside.command("sleep", "600"))
    pid, cookie = program.process.pid, namespaces.cookie(inside.path)
    until("it is inside", lambda: namespaces.cookie(pid) == cookie)
    result = [0, 0]

    def path_of(_cookie: int) -> Path:
        program.process.kill()
        program.process.wait()
        victim = host.start_command(host.netns.command(programs["with_pid"], pid, "sleep", "600"))
        victim.says("started")
        return Path(f"/proc/{pid}/ns/net")

    def supervise() -> None:
        switch = NamespaceSwitch(host.settings.host_netns, path_of)
        try:
            opened = opening(switch, cookie)
        except OSError as error:
            result[1] = error.errno or 0
        else:
            with switch.entered(opened):
                result[0] = namespaces.cookie()
            os.close(opened)
        os.close(switch.host)

    thread = threading.Thread(target=supervise)  # it stays in the host's namespace
    thread.start()
    thread.join()
    return result[0], result[1]


def test_the_namespace_of_a_process_that_has_ended_is_not_the_next_ones(
    host: Host, programs: Programs, netns: Callable[[], Netns]
) -> None:
    assert opened_inside(host, programs, netns(), NamespaceSwitch.open) == (0, errno.ENONET)


def test_control_where_it_is_not_compared_again_it_is_the_hosts(
    host: Host, programs: Programs, netns: Callable[[], Netns]
) -> None:
    def open_as_found(switch: NamespaceSwitch, cookie: int) -> int:
        path = switch._paths(cookie)
        assert path is not None
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    opened, _ = opened_inside(host, programs, netns(), open_as_found)
    assert opened == namespaces.cookie(host.settings.host_netns)
