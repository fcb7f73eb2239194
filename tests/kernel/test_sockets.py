"""Sockets as the kernel lists them, with their tags; and the closing of one of them, and of no other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from graft.datapath import layout
from graft.kernel import cgroup, netns, sockets
from graft.kernel.sockets import Kind, ListedSocket
from tests.support.installation import Host

pytestmark = pytest.mark.kernel

MPTCP = 262
LISTS_BOUND = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 8)
Made = tuple[socket.socket, ...]


def tcp(address: str, protocol: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, protocol)
    sock.settimeout(10)
    return sock


def listener(address: str, protocol: int = 0, port: int = 0, shared: bool = False) -> socket.socket:
    sock = tcp(address, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    sock.bind((address, port))
    sock.listen()
    return sock


def connected(address: str, server: str | None = None) -> Made:
    """One end of a connection, the other, and the listener."""
    waiting = listener(server or address)
    sock = tcp(address)
    sock.connect((address, waiting.getsockname()[1]))
    return sock, waiting.accept()[0], waiting


def datagrams() -> Made:
    one, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for sock in (one, other):
        sock.bind(("127.0.0.1", 0))
    one.connect(other.getsockname())
    return one, other


MAKERS: dict[str, Callable[[], Made]] = {
    "listener": lambda: (listener("127.0.0.1"),),
    "listener on any address": lambda: (listener("0.0.0.0"),),
    "listener of IPv6": lambda: (listener("::1"),),
    "listener of both families": lambda: (listener("::"),),
    "listener of IPv6 on an IPv4 address": lambda: (listener("::ffff:127.0.0.1"),),
    "connection": lambda: connected("127.0.0.1"),
    "connection of IPv6": lambda: connected("::1"),
    "connection of IPv6 over IPv4": lambda: connected("::ffff:127.0.0.1", "0.0.0.0"),
    "connection of UDP": datagrams,
}


@pytest.fixture
def inside(host: Host) -> Iterator[None]:
    with host.netns.inside():
        yield


def listed(host: Host, sock: socket.socket) -> ListedSocket | None:
    inode = os.fstat(sock.fileno()).st_ino
    tags = host.maps.tags
    return next((one.read() for one in sockets.list_sockets(tags.fd) if one.inode == inode), None)


def is_ended(sock: socket.socket, before: ListedSocket) -> bool:
    """By what the program that has it sees."""
    sock.setblocking(False)
    try:
        sock.accept() if before.state == "listening" else sock.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.skipif(not sockets.can_destroy(), reason="a kernel before 6.9")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_socket_is_ended_and_no_other(host: Host, inside: None, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        sock, *others = (stack.enter_context(sock) for sock in MAKERS[kind]())
        another = stack.enter_context(listener("127.0.0.1"))
        found = listed(host, sock)
        assert found is not None
        sockets.destroy(found)
        assert is_ended(sock, found)
        for left in (*others[1:], another):
            still = listed(host, left)
            assert still is not None and not is_ended(left, still)
        if found.protocol == "tcp":
            with pytest.raises(OSError):
                sockets.destroy(found)


@pytest.mark.skipif(not sockets.can_destroy(), reason="a kernel before 6.9")
def test_of_several_that_share_a_port_the_one_that_is_meant_is_ended(host: Host, inside: None) -> None:
    first = listener("127.0.0.1", shared=True)
    group = [first, *(listener("127.0.0.1", 0, first.getsockname()[1], shared=True) for _ in range(7))]
    try:
        meant = group[5]
        found = listed(host, meant)
        assert found is not None
        sockets.destroy(found)
        assert [sock is meant for sock in group] == [is_ended(sock, found) for sock in group]
    finally:
        for sock in group:
            sock.close()


@pytest.mark.parametrize("protocol", [0, MPTCP], ids=["tcp", "mptcp"])
def test_a_tcp_socket_is_listed_with_its_tag_and_its_cgroup(host: Host, inside: None, protocol: int) -> None:
    with listener("127.0.0.1", protocol) as sock:
        assert (found := listed(host, sock)) is not None and found.stored is None
        assert found.is_mptcp == (protocol == MPTCP)
        host.maps.tags.put(ctypes.c_int32(sock.fileno()), layout.Tag(container=4711, endpoint=12))
        found = listed(host, sock)
        assert found is not None and found.stored is not None
        tag = layout.Tag.from_buffer_copy(found.stored)
        assert (tag.container, tag.endpoint) == (4711, 12)
        assert found.cgroup == cgroup.cgroup_id(cgroup.of_process(os.getpid()))


@pytest.mark.parametrize("protocol", [0, MPTCP], ids=["tcp", "mptcp"])
def test_a_listener_that_is_shut_down_by_a_descriptor_serves_nobody(host: Host, inside: None, protocol: int) -> None:
    with listener("127.0.0.1", protocol) as sock:
        found = listed(host, sock)
        assert found is not None
        sockets.shut_down(sock.fileno())
        assert is_ended(sock, found)


def test_a_socket_that_drops_what_comes_receives_nothing_and_cannot_change_that(host: Host, inside: None) -> None:
    one, other = datagrams()
    with one, other:
        sockets.drop_incoming(other.fileno())
        one.send(b"hello")
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.recv(10)
        with pytest.raises(PermissionError):
            other.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER


def test_a_request_that_could_keep_others_waiting_is_not_made_on_older_kernels() -> None:
    assert [sockets.can_destroy(release) for release in ("6.1.0-56-cloud-amd64", "6.8.12", "6.9.0", "6.12", "7.3")] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_what_is_only_bound_is_listed_apart(host: Host, inside: None) -> None:
    with tcp("127.0.0.1") as bound, listener("127.0.0.1") as other:
        bound.bind(("127.0.0.1", 0))
        inodes = {os.fstat(sock.fileno()).st_ino: sock for sock in (bound, other)}
        tags = host.maps.tags
        of = {
            kind: [inodes[one.inode] for one in sockets.list_sockets(tags.fd, (kind,)) if one.inode in inodes]
            for kind in Kind
        }
        assert of == {Kind.TCP: [other], Kind.BOUND: [bound] if LISTS_BOUND else [], Kind.UDP: []}


@pytest.mark.parametrize("number", [1, 512, 513, 1500])
def test_of_some_cgroups_the_sockets_that_were_made_there_are_listed(host: Host, inside: None, number: int) -> None:
    own, tags = cgroup.cgroup_id(cgroup.of_process(os.getpid())), host.maps.tags
    with contextlib.ExitStack() as stack:
        made = [listener("127.0.0.1"), *datagrams()]
        for sock in made:
            stack.enter_context(sock)
        inodes = {os.fstat(sock.fileno()).st_ino for sock in made}
        for cgroups, expected in (
            ([1 << 40 | index for index in range(number - 1)] + [own], inodes),
            ([own] + [1 << 40 | index for index in range(number - 1)], inodes),
            ([1 << 40 | index for index in range(number)], set()),
            ([], set()),
        ):
            found = [one.inode for one in sockets.list_sockets(tags.fd, cgroups=cgroups)]
            assert len(found) == len(set(found)) and inodes.intersection(found) == expected


DATAGRAMS: dict[str, Callable[[], Made]] = {
    "bound": lambda: (datagram("127.0.0.1"),),
    "on any address": lambda: (datagram("0.0.0.0"),),
    "of IPv6": lambda: (datagram("::1"),),
    "of both families": lambda: (datagram("::"),),
    "of IPv6 on an IPv4 address": lambda: (datagram("::ffff:127.0.0.1"),),
    "connected": datagrams,
    "on an interface": lambda: (datagram("127.0.0.1", "lo"),),
}


def datagram(address: str, interface: str = "") -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))
    if interface:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    return sock


@pytest.mark.parametrize("kind", DATAGRAMS)
def test_a_udp_socket_is_read_from_its_descriptor_as_it_is_listed(host: Host, inside: None, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        sock, *_ = (stack.enter_context(sock) for sock in DATAGRAMS[kind]())
        found = listed(host, sock)
        assert found is not None
        read = sockets.socket_of(sock.fileno(), found.inode, ["tcp", "udp"])
        assert read == (netns.cookie(), replace(found, cgroup=0))


@pytest.mark.parametrize("family", ["127.0.0.1", "::1"])
def test_a_tcp_socket_is_read_from_its_descriptor_as_it_is_listed(host: Host, inside: None, family: str) -> None:
    with contextlib.ExitStack() as stack:
        for sock in [stack.enter_context(sock) for sock in connected(family)]:
            found = listed(host, sock)
            assert found is not None
            read = sockets.socket_of(sock.fileno(), found.inode, ["tcp"])
            assert read == (netns.cookie(), replace(found, cgroup=0))


def test_of_other_sockets_nothing_is_read(inside: None) -> None:
    kinds = (socket.AF_INET, socket.AF_UNIX)
    with listener("127.0.0.1") as one, contextlib.ExitStack() as stack:
        unbound = [stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for family in kinds]
        assert [sockets.socket_of(sock.fileno(), 1, ["udp"]) for sock in (one, *unbound)] == [None] * 3
        assert sockets.socket_of(unbound[0].fileno(), 1, ["tcp"]) is None
