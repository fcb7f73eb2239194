"""Answers about sockets come from the kernel, and from no other process of the namespace."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

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


@contextmanager
def diagnostics_of(place: Netns) -> Iterator[Diagnostics]:
    with namespaces.entered(place.path):
        diagnostics = Diagnostics()
        try:
            yield diagnostics
        finally:
            diagnostics.close()


def listener(family: int, address: str, port: int = 0, v6only: bool = False) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    made.bind((address, port))
    made.listen()
    return made


def count_at(diagnostics: Diagnostics, family: int, address: str, port: int) -> int:
    return sum(map(len, diagnostics.listeners_at(family, address, port)))


def test_all_listeners_are_found_that_a_connection_may_reach(netns: Callable[[], Netns]) -> None:
    with diagnostics_of(netns()) as diagnostics, ExitStack() as stack:
        four, six = socket.AF_INET, socket.AF_INET6
        first = stack.enter_context(listener(four, "127.0.0.1"))
        port = first.getsockname()[1]
        for family, address, v6only in ((four, "127.0.0.1", False), (four, "127.0.0.2", False), (six, "::1", False)):
            stack.enter_context(listener(family, address, port, v6only))
        assert count_at(diagnostics, four, "127.0.0.1", port) == 2
        assert count_at(diagnostics, four, "127.0.0.2", port) == 1
        assert count_at(diagnostics, six, "::1", port) == 1
        assert count_at(diagnostics, four, "127.0.0.1", port + 1 if port < 65535 else 1) == 0
        stack.enter_context(listener(six, "::", port, True))  # for IPv6 only
        assert count_at(diagnostics, four, "127.0.0.1", port) == 2
        stack.enter_context(listener(six, "::ffff:127.0.0.1", port))
        assert count_at(diagnostics, four, "127.0.0.1", port) == 3
        assert count_at(diagnostics, six, "::1", port) == 2


def test_the_other_end_of_a_connection_is_found_when_it_was_accepted(netns: Callable[[], Netns]) -> None:
    with diagnostics_of(netns()) as diagnostics, listener(socket.AF_INET, "127.0.0.1") as server:
        with socket.create_connection(server.getsockname()) as near:
            far = diagnostics.far_end(near)
            assert far is not None and far.remote[1] == near.getsockname()[1] and far.cgroup
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        with socket.create_connection(server.getsockname()) as near:
            assert diagnostics.far_end(near) is None


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_udp_socket_is_listed_with_what_it_has_not_read(netns: Callable[[], Netns], family: int) -> None:
    with diagnostics_of(netns()) as diagnostics, socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))

        def unread() -> int:
            (found,) = [one for piece in diagnostics.datagram_sockets() for one in piece]
            return found.unread

        assert unread() == 0
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            for data in (b"", b"x", b"x" * 1000):
                client.sendto(data, server.getsockname())
            client.close()
        for _ in range(3):
            assert unread() > 0
            server.recv(2000)
        assert unread() == 0
