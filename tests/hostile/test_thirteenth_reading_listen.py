"""What a thirteenth reading found: `graft listen` waited for what ended containers had handed to somebody outside, who
kept it locked, and attached nobody meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.kernel import seccomp, sockets
from graft.kernel.seccomp_filter import swap_filter
from tests.hostile.conftest import graft_without
from tests.hostile.test_listener import can_connect, container, end, send
from tests.support.cgroups import new_cgroup
from tests.support.holding import NOBODY_WITH_A_PAGE
from tests.support.installation import Host
from tests.support.namespaces import namespace
from tests.support.wait import PATIENCE, until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not sockets.can_destroy(), reason="nothing is closed that a container has left, before 6.9"),
]

CONTAINERS = 3
TOO_LONG = 10.0  # seconds; where it waits for them, it waits for about six for each
POLICY = "name: left\nendpoints: {out: '127.0.0.1:dynamic'}\negress: [{to: 127.0.0.1, endpoint: out}]\n"
SENDTO = "44"
OUTSIDE = (
    NOBODY_WITH_A_PAGE
    + """
import socket
inbox = socket.socket(fileno=int(sys.argv[1]))
_, (locked, other), _, _ = socket.recv_fds(inbox, 1, 2)
threading.Thread(target=libc.send, args=(locked, ctypes.c_void_p(at), 1000, 0), daemon=True).start()
signal.pause()
"""
)


@contextlib.contextmanager
def outside() -> Iterator[tuple[socket.socket, int]]:
    """A process of no container, which keeps the first of two sockets locked that it is sent; and its process id."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-ISc", OUTSIDE, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as program:
            try:
                yield ours, program.pid
            finally:
                program.kill()


@contextlib.contextmanager
def giving(
    cgroup: Path, inbox: socket.socket, port: int, listens: bool = False
) -> Iterator[tuple[int, int, socket.socket]]:
    """A container whose first process hands out two connections when it is told to: its process id, the filter's
    listener, and where it is told. With ``listens`` it listens with the first one when it is told again.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            (cgroup / "cgroup.procs").write_text("0")
            listener, _ = seccomp.install_listener(swap_filter())
            socket.send_fds(theirs, [b"x"], [listener])
            os.close(listener)
            ours.close()
            theirs.recv(1)
            made = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
            socket.send_fds(inbox, [b"x"], [one.fileno() for one in made])
            theirs.recv(1)
            if listens:
                made[0].listen(1)
        os._exit(0)
    try:
        _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
        yield pid, listener, ours
    finally:
        ours.close()
        theirs.close()
        end(pid)


def sends(pid: int) -> bool:
    """Whether a thread of the process is in a send(2)."""
    found = Path(f"/proc/{pid}/task").glob("*/syscall")
    return any(one.read_text().split()[0] == SENDTO for one in found)


def attached_after(host: Host, folder: Path, without: str = "") -> tuple[float, list[bytes]]:
    """How long a container waits to be attached after others have ended, and what the far ends receive of those of
    their connections that nobody keeps locked.
    """
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(folder / "policy.yaml")}}))
    serving = host.start_command([*graft_without(without), "listen"])
    serving.until("graft listen listens", lambda: can_connect(host.settings.run_dir / "listener"))
    port, ended, ends = host.port(), [], []
    with ExitStack() as stack:
        far = stack.enter_context(host.netns.listener("127.0.0.1", port))
        inside = stack.enter_context(namespace("inside"))
        with inside.inside():
            other, other_listener = stack.enter_context(container(stack.enter_context(new_cgroup("other"))))
        for index in range(CONTAINERS):
            cgroup = stack.enter_context(new_cgroup(f"ends-{index}"))
            inbox, holder = stack.enter_context(outside())
            with inside.inside():
                pid, listener, told = stack.enter_context(giving(cgroup, inbox, port))
            send(host, f"ends-{index}", pid, folder, [listener])
            os.close(listener)
            serving.says(f"ends-{index}: attached")
            told.send(b"x")
            ends += [stack.enter_context(far.accept()[0]) for _ in range(2)]
            until("its socket is locked", lambda holder=holder: sends(holder))  # type: ignore[misc]
            ended.append(pid)
        begun = time.monotonic()
        for pid in ended:
            end(pid)
        serving.says(f"ends-{CONTAINERS - 1}: ended", 60)
        send(host, "other", other, folder, [other_listener])
        serving.says("other: attached", 60)
        waited = time.monotonic() - begun
        return waited, [received(one) for one in ends[1::2]]


def received(one: socket.socket) -> bytes:
    one.settimeout(5.0 * PATIENCE)
    with contextlib.suppress(ConnectionResetError):
        return one.recv(1)
    return b"reset"


def test_a_socket_that_is_kept_locked_delays_no_other_container(host: Host, tmp_path: Path) -> None:
    waited, others = attached_after(host, tmp_path)
    assert waited < TOO_LONG
    assert others == [b"reset"] * CONTAINERS


def test_control_where_graft_listen_waits_for_them_it_does(host: Host, tmp_path: Path) -> None:
    assert attached_after(host, tmp_path, "leftovers waited for")[0] > TOO_LONG
