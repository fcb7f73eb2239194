"""Descriptors of a process in /proc, and epoll registrations of a replaced socket."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
from pathlib import Path

from graft.swap import descriptors
from graft.swap.descriptors import Registration, parse_registrations

OLD = b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\ntfd:        5 events:       19 data:         1122334455667788\n"
NEW = (
    b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t77\n"
    b"tfd:        5 events:       19 data:         abcdef0123456789  pos:0 ino:1a2b sdev:9\n"
    b"tfd:        6 events: 80000001 data:                7  pos:0 ino:1a2c sdev:9\n"
    b"tfd:        7 events:        1 data: ffffffffffffffff  pos:-1 ino:1a2b sdev:9\n"
)


def test_a_registration_is_found_with_its_events_and_its_data() -> None:
    assert parse_registrations(9, NEW, frozenset({5}), 0x1A2B) == [Registration(9, 5, 0x19, 0xABCDEF0123456789)]


def test_a_registration_under_a_duplicates_number_is_found_too() -> None:
    found = parse_registrations(9, NEW, frozenset({5, 7}), 0x1A2B)
    assert [one.fd for one in found] == [5, 7]
    assert found[1].data == 2**64 - 1


def test_a_registration_of_another_file_at_the_same_number_is_not_found() -> None:
    assert parse_registrations(9, NEW, frozenset({6}), 0x1A2B) == []


def test_on_kernels_that_print_no_inode_the_number_decides() -> None:
    assert parse_registrations(9, OLD, frozenset({5}), 0x1A2B) == [Registration(9, 5, 0x19, 0x1122334455667788)]


def test_duplicates_and_registrations_of_a_socket_are_found() -> None:
    with socket.socket() as sock, select.epoll() as epoll, contextlib.ExitStack() as stack:
        duplicate = stack.enter_context(socket.socket(fileno=os.dup(sock.fileno())))
        epoll.register(duplicate.fileno(), select.EPOLLIN | select.EPOLLET)
        found = descriptors.find_references(os.getpid(), os.fstat(sock.fileno()).st_ino, sock.fileno())
        assert found.duplicates == (duplicate.fileno(),)
        (registration,) = found.registrations
        assert (registration.epoll, registration.fd) == (epoll.fileno(), duplicate.fileno())
        assert registration.events & (select.EPOLLIN | select.EPOLLET) == select.EPOLLIN | select.EPOLLET


def test_a_replacement_socket_is_registered_like_the_socket_that_it_replaces() -> None:
    with socket.socket() as old, socket.socket() as replacement, select.epoll() as epoll:
        epoll.register(old.fileno(), select.EPOLLIN)
        number = old.fileno()
        before = sorted(os.listdir("/proc/self/fd"))
        descriptors.copy_registrations(
            (Registration(epoll.fileno(), number, select.EPOLLOUT, 0x42),), replacement.fileno(), os.dup
        )
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert os.fstat(number).st_ino == os.fstat(old.fileno()).st_ino
        lines = Path(f"/proc/self/fdinfo/{epoll.fileno()}").read_bytes()
        inode = os.fstat(replacement.fileno()).st_ino
        # Registered under the program's number for the socket, not under its number in this process.
        found = parse_registrations(epoll.fileno(), lines, frozenset({number}), inode)
        assert [(one.fd, one.data) for one in found] == [(number, 0x42)]


def test_a_number_that_cannot_be_used_here_leaves_no_descriptor_open() -> None:
    last = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1  # no number is higher: F_DUPFD ends with EINVAL
    with socket.socket() as replacement, select.epoll() as epoll:
        before = sorted(os.listdir("/proc/self/fd"))
        descriptors.copy_registrations(
            (Registration(epoll.fileno(), last, select.EPOLLOUT, 0),), replacement.fileno(), os.dup
        )
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_flags_of_a_descriptor_are_read_with_close_on_exec() -> None:
    folder = os.open("/proc/self/fdinfo", os.O_RDONLY)
    try:
        with socket.socket() as sock:
            sock.setblocking(False)
            flags = descriptors.descriptor_flags(folder, sock.fileno())
            assert flags & os.O_NONBLOCK and flags & os.O_CLOEXEC
            sock.setblocking(True)
            sock.set_inheritable(True)
            assert not descriptors.descriptor_flags(folder, sock.fileno()) & (os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(folder)
