"""`graft listen` ends the process that a message was about, and no other that has its number by now."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from graft.kernel import seccomp
from tests.hostile.undefended import COMMAND
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.program import Program, start
from tests.support.shell import Word

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def container() -> Iterator[tuple[int, int]]:
    """A process under a filter, as a runtime has made one just now: its number, and the filter's listener."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        listener, _ = seccomp.install_listener()
        socket.send_fds(theirs, [b"x"], [listener])
        time.sleep(600)
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
    """A file that whoever opens it has to wait for, until it is closed (fcntl(2), "Leases": 45 seconds at most)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def wait(self) -> None:
        """Until somebody opens it."""
        assert signal.sigtimedwait({signal.SIGIO}, 30) is not None, "nobody opens it"

    def close(self) -> None:
        """Let those who wait have it. Safe to repeat."""
        if self._fd >= 0:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.close(self._fd)
            self._fd = -1
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def taken_over(host: Host, programs: Programs, folder: Path, command: Sequence[Word]) -> Program:
    """A process that got the number of a container's first one, while `graft listen` looked whether it may stay."""
    serving = start([*command, "listen"], {**os.environ, **host.environment})
    host.started.append(serving)
    path = host.settings.run_dir / "listener"
    (folder / "policy.yaml").write_text("no policy")
    (folder / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(folder / "policy.yaml")}}))
    policy = Leased(folder / "policy.yaml")  # what takes its time here
    with contextlib.closing(policy), container() as (pid, listener), socket.socket(socket.AF_UNIX) as runtime:
        # Its path is there a moment before it listens.
        serving.until("graft listen listens", lambda: runtime.connect_ex(str(path)) == 0)
        state = {"id": "hostile", "pid": pid, "bundle": str(folder), "fds": ["seccompFd"]}
        socket.send_fds(runtime, [json.dumps(state).encode()], [listener])
        policy.wait()  # it is opened when it is read there
        end(pid)
        victim = start([programs["reborn"], pid, "sleep", "600"])
        host.started.append(victim)
        victim.says("started")
        policy.close()
        serving.says("hostile: refused, and ended: ")
    serving.process.terminate()
    assert serving.wait() == 0  # whatever it was to kill, it has killed by now
    return victim


def test_the_next_process_with_its_number_is_left_alone(host: Host, programs: Programs, tmp_path: Path) -> None:
    victim = taken_over(host, programs, tmp_path, [GRAFT])
    with pytest.raises(subprocess.TimeoutExpired):
        victim.process.wait(0.2)


def test_control_without_the_defence_it_is_killed(host: Host, programs: Programs, tmp_path: Path) -> None:
    victim = taken_over(host, programs, tmp_path, [sys.executable, COMMAND, "listener"])
    victim.says(f"ended -{signal.SIGKILL}")
