"""What a supervisor repeats for a program it does without root's rights."""

from __future__ import annotations

import socket
import sys

import pytest

from graft.kernel.credentials import with_capabilities
from tests.hostile.undefended import COMMAND
from tests.support.installation import Host
from tests.support.shell import run

pytestmark = pytest.mark.e2e

SO_MARK, SO_PRIORITY = 36, 12

# Root's program: it may set any priority in its own namespace (CAP_NET_RAW), and its socket is replaced by the host's.
PROGRAM = f"""
import socket
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, {SO_PRIORITY}, -1)
s.bind(("0.0.0.0", 80))
print(s.getsockopt(socket.SOL_SOCKET, {SO_PRIORITY}))
"""


def rules(host: Host) -> list[str]:
    return ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}", "--", "/usr/bin/python3", "-ISc", PROGRAM]


def test_a_priority_that_only_root_may_have_is_not_carried_to_the_host(host: Host) -> None:
    assert host.graft("run", *rules(host)).stdout == "0\n"


def test_control_with_roots_rights_it_is(host: Host) -> None:
    command = [sys.executable, str(COMMAND), "rights", "run", *rules(host)]
    assert run(command, environment=host.environment, status=0).stdout == "-1\n"


def test_with_no_capability_root_is_a_user_like_others_and_then_root_again(root: None) -> None:
    with socket.socket() as sock:
        with with_capabilities(), pytest.raises(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 1)
