"""`graft listen` kills the process that a message names, and no other that has its process id by then."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from graft.kernel import seccomp
from tests.hostile.conftest import graft_without
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.program import Program
from tests.support.shell import Word
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def container() -> Iterator[tuple[int, int]]:
    """A process under a filter, as a runtime makes one: its process id, and the filter's listener."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        listener, _ = seccomp.install_listener()
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


class Leased:
    """A file whose next reader waits until it is closed here (fcntl(2), "Leases": 45 seconds at most)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def wait(self) -> None:
        """Wait until another process opens it."""
        assert signal.sigtimedwait({signal.SIGIO}, 30 * PATIENCE) is not None, "no process opens it"

    def close(self) -> None:
        """Let those who wait read it. Safe to repeat."""
        if self._fd >= 0:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.close(self._fd)
            self._fd = -1
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def process_with_reused_id(host: Host, programs: Programs, folder: Path, command: Sequence[Word]) -> Program:
    """A process that got the process id of a container's first one while `graft listen` read that one's policy."""
    serving = host.start_command([*command, "listen"])
    path = host.settings.run_dir / "listener"
    (folder / "policy.yaml").write_text("no policy")
    (folder / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(folder / "policy.yaml")}}))
    policy = Leased(folder / "policy.yaml")  # reading it takes as long as the test wants
    with contextlib.closing(policy), container() as (pid, listener), socket.socket(socket.AF_UNIX) as runtime:
        # Its path is there a moment before it listens.
        serving.until("graft listen listens", lambda: runtime.connect_ex(str(path)) == 0)
        state = {"id": "hostile", "pid": pid, "bundle": str(folder), "fds": ["seccompFd"]}
        socket.send_fds(runtime, [json.dumps(state).encode()], [listener])
        policy.wait()
        end(pid)
        victim = host.start_command([programs["with_pid"], pid, "sleep", "600"])
        victim.says("started")
        policy.close()
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
