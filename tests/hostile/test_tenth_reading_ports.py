"""A port that an endpoint gave to a UDP socket of transport swap, when the socket has let go of the endpoint."""

from __future__ import annotations

import ctypes
import os
from contextlib import closing

import pytest

from graft.datapath import layout
from graft.kernel.pidfd import pidfd_getfd
from tests.hostile.conftest import Without
from tests.hostile.test_ferry import PYTHON, out_rule
from tests.support.installation import Host
from tests.support.shell import AS_NOBODY

pytestmark = pytest.mark.e2e

LETS_GO = """
import ctypes, os, socket
libc = ctypes.CDLL(None)
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(('127.0.0.1', 5300))
print(os.getpid(), one.fileno(), flush=True)
input()
assert libc.connect(one.fileno(), bytes(16), 16) == 0  # AF_UNSPEC
one.bind(('0.0.0.0', 0))
print('bound to no endpoint', flush=True)
input()
"""


def tag_after_it_let_go(host: Host) -> layout.Tag:
    """The tag of a socket that was bound to an endpoint with a dynamic port, and is bound to none.

    With a port that is open in it, a program would try for the kernel to give that port again, which takes seconds.
    """
    rules = ["-i", f"127.0.0.1:5300={host.endpoint('127.0.0.1:dynamic')}", *out_rule(host)]
    program = host.start(*rules, "--", *AS_NOBODY, *PYTHON, LETS_GO, talk=True)
    program.until("bound", lambda: program.said.endswith("\n"))
    pid, fd = map(int, program.said.split())
    pidfd = os.pidfd_open(pid)
    try:
        with closing(os.fdopen(pidfd_getfd(pidfd, fd))) as socket:
            before = host.maps.tags.get(ctypes.c_int32(socket.fileno()))
            assert before is not None and before.open_port == before.bound_port != 0
            program.tell("\n")
            program.says("bound to no endpoint")
            after = host.maps.tags.get(ctypes.c_int32(socket.fileno()))
            assert after is not None and not after.endpoint
            return after
    finally:
        os.close(pidfd)


def test_no_port_stays_open_to_everybody(host: Host) -> None:
    assert tag_after_it_let_go(host).open_port == 0


def test_control_where_it_is_not_forgotten_one_does(without: Without) -> None:
    assert tag_after_it_let_go(without("open port")).open_port != 0
