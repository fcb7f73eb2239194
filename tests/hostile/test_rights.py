"""A supervisor repeats a program's socket options without root's rights."""

from __future__ import annotations

import socket

import pytest

from graft.kernel.credentials import with_capabilities
from tests.hostile.conftest import graft_without
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


def run_words(host: Host) -> list[str]:
    return ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}", "--", "/usr/bin/python3", "-ISc", PROGRAM]


def test_a_priority_that_only_root_may_set_is_not_copied_to_the_host(host: Host) -> None:
    assert host.graft("run", *run_words(host)).stdout == "0\n"


def test_control_with_roots_rights_it_is_copied(host: Host) -> None:
    command = [*graft_without("rights"), "run", *run_words(host)]
    assert run(command, environment=host.environment, status=0).stdout == "-1\n"


def test_root_gives_its_capabilities_up_for_a_while_and_gets_them_back(root: None) -> None:
    with socket.socket() as sock:
        with with_capabilities(), pytest.raises(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 1)
