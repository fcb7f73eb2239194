"""`graft listen` with a socket of the service manager's: containers wait at it until it is started."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hostile.test_fifteenth_reading_listen import bundle, send_container
from tests.support.installation import GRAFT, Host
from tests.support.program import Program

pytestmark = pytest.mark.e2e

ACTIVATES = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.bind(sys.argv[1])
sock.listen(128)
print("bound", flush=True)
sys.stdin.readline()
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.execve(sys.argv[2], sys.argv[2:], {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
"""


def activated(host: Host, path: Path) -> Program:
    """`graft listen` as soon as it is told to go on; its socket is there before."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    program = host.start_command([sys.executable, "-c", ACTIVATES, path, GRAFT, "listen"], talk=True)
    program.says("bound")
    return program


def test_a_container_that_came_before_is_served_and_the_socket_stays(host: Host, tmp_path: Path) -> None:
    path = host.settings.run_dir / "listener"
    serving = activated(host, path)
    with ExitStack() as stack:
        send_container(stack, host, "early", bundle(tmp_path / "bundle"))
        serving.tell("go\n")
        serving.says("early: attached")
    serving.process.terminate()
    assert serving.process.wait(30) == 0
    assert path.is_socket()


def test_a_socket_at_another_path_is_refused(host: Host, tmp_path: Path) -> None:
    serving = activated(host, tmp_path / "other")
    serving.tell("go\n")
    assert serving.process.wait(30) == 2, serving.complained
    assert "the service manager's sockets are not the one at" in serving.complained
