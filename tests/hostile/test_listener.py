"""`graft listen` kills the process that a message names, and no other that has its process id by then. One container
does not use up what it has for all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.kernel import seccomp
from graft.kernel.seccomp_filter import swap_filter
from tests.hostile.conftest import graft_without
from tests.support.building import Programs
from tests.support.cgroups import new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.open_files import open_in
from tests.support.program import Program
from tests.support.shell import Word

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def container(cgroup: Path) -> Iterator[tuple[int, int]]:
    """A process under a filter in a cgroup, as a runtime makes one: its process id, and the filter's listener."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        (cgroup / "cgroup.procs").write_text("0")
        listener, _ = seccomp.install_listener(swap_filter())
        socket.send_fds(theirs, [b"x"], [listener])
        signal.pause()
        os._exit(0)
    try:
        _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
        yield pid, listener
        os.close(listener)
    finally:
        ours.close()
        theirs.close()
        end(pid)


def end(pid: int) -> None:
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def process_with_reused_id(host: Host, programs: Programs, folder: Path, command: Sequence[Word]) -> Program:
    """A process that got the process id of a container's first one while `graft listen` waited for Graft's lock."""
    serving = host.start_command([*command, "listen"])
    path = host.settings.run_dir / "listener"
    (folder / "policy.yaml").write_text("name: hostile\n")
    (folder / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(folder / "policy.yaml")}}))
    with ExitStack() as stack:
        cgroup = stack.enter_context(new_cgroup("hostile"))
        pid, listener = stack.enter_context(container(cgroup))
        runtime = stack.enter_context(socket.socket(socket.AF_UNIX))
        # Its path is there a moment before it listens.
        serving.until("graft listen listens", lambda: runtime.connect_ex(str(path)) == 0)
        lock = stack.enter_context(open(host.settings.run_dir / "lock"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = {"id": "hostile", "pid": pid, "bundle": str(folder), "fds": ["seccompFd"]}
        socket.send_fds(runtime, [json.dumps(state).encode()], [listener])
        serving.until("it waits for the lock", lambda: open_in(serving.process.pid, Path(lock.name)))
        end(pid)
        victim = host.start_command([programs["with_pid"], pid, "sleep", "600"])
        victim.says("started")
        fcntl.flock(lock, fcntl.LOCK_UN)
        serving.says("hostile: refused, and ended: ")
        serving.process.terminate()
        assert serving.wait() == 0  # if it kills a process, it has done so by now
    return victim


def test_the_next_process_with_its_id_is_left_alone(host: Host, programs: Programs, tmp_path: Path) -> None:
    victim = process_with_reused_id(host, programs, tmp_path, [GRAFT])
    with pytest.raises(subprocess.TimeoutExpired):
        victim.process.wait(0.2)


def test_control_without_the_defence_it_is_killed(host: Host, programs: Programs, tmp_path: Path) -> None:
    victim = process_with_reused_id(host, programs, tmp_path, graft_without("listener"))
    victim.says(f"ended -{signal.SIGKILL}")


# ---- a health check leaves a process behind each time, with a listener for each --------------------------------------

DESCRIPTORS = 170


def send(host: Host, container_id: str, pid: int, bundle: Path, listeners: Sequence[int]) -> None:
    """As a runtime sends a container's listener."""
    state = {"id": container_id, "pid": pid, "bundle": str(bundle), "fds": ["seccompFd"]}
    with socket.socket(socket.AF_UNIX) as runtime:
        runtime.connect(str(host.settings.run_dir / "listener"))
        socket.send_fds(runtime, [json.dumps(state).encode()], listeners)


def test_a_container_with_many_listeners_leaves_room_for_others(host: Host, tmp_path: Path) -> None:
    """Each of two containers may have 64 supervisors; the process that serves all has few descriptors here."""
    (tmp_path / "policy.yaml").write_text("name: p\n")
    (tmp_path / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(tmp_path / "policy.yaml")}}))
    command: list[Word] = ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", GRAFT, "listen"]
    serving = host.start_command(command)
    with ExitStack() as stack:
        for name in ("first", "second"):
            cgroup = stack.enter_context(new_cgroup(name))
            pid, listener = stack.enter_context(container(cgroup))
            if name == "first":
                path = host.settings.run_dir / "listener"
                serving.until("graft listen listens", lambda path=path: can_connect(path))  # type: ignore[misc]
            send(host, name, pid, tmp_path, [listener])
            serving.says(f"{name}: attached")
            for _ in range(DESCRIPTORS // 16 + 1):
                send(host, name, 0, tmp_path, [stack.enter_context(container(cgroup))[1]])
            serving.says(f"{name}: refused")
        last, listener = stack.enter_context(container(stack.enter_context(new_cgroup("last"))))
        send(host, "last", last, tmp_path, [listener])
        serving.says("last: attached")
        send(host, "last", last, tmp_path, [])
        serving.says("last: refused: its message has no seccomp listener")
    for name in ("first", "second", "last"):
        serving.says(f"{name}: ended")
    serving.process.terminate()
    assert serving.wait() == 0


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as runtime:
        return runtime.connect_ex(str(path)) == 0
