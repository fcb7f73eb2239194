"""Answers about sockets come from the kernel, and from no other process of the namespace."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest

from graft.kernel import netns as namespaces
from graft.kernel.sockdiag import NETLINK_SOCK_DIAG, Diagnostics
from tests.support.namespaces import Netns

pytestmark = pytest.mark.kernel

FORGED = struct.pack("=IHHII", 0, 20, 2, 0, 0) + bytes(
    72
)  # of size 0: a reader that skips to the next message never ends


def netlink() -> socket.socket:
    """A socket as a container's root can make it."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    sock.settimeout(5)
    return sock


def test_a_forged_answer_is_refused_by_the_kernel(netns: Callable[[], Netns]) -> None:
    with namespaces.entered(netns().path), netlink() as forger, socket.create_server(("127.0.0.1", 0)) as server:
        diagnostics = Diagnostics()
        try:
            with pytest.raises(ConnectionRefusedError):
                forger.sendto(FORGED, diagnostics._sock.getsockname())
            assert [found.port for piece in diagnostics.listeners() for found in piece] == [server.getsockname()[1]]
        finally:
            diagnostics.close()


def test_control_a_socket_that_is_not_connected_receives_a_forged_answer(netns: Callable[[], Netns]) -> None:
    with namespaces.entered(netns().path), netlink() as forger, netlink() as asking:
        asking.bind((0, 0))
        forger.sendto(FORGED, asking.getsockname())
        assert asking.recv(1 << 16) == FORGED
