"""What /proc says of a process whose program chose its name."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import pytest

from graft import carry
from graft.kernel import pidfd, process

NAMES = [b"nginx", b"a b", b") R 1 1", b"(", b")", b"x\nPPid:\t1", b"\xff\xfe", b"", b"1) S 99 (2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_parent_is_found_behind_any_name(name: bytes) -> None:
    assert process.parse_parent(b"42 (" + name + b") S 7 42 42 0 -1 4194304") == 7


@pytest.mark.parametrize("stat", [b"", b"42 (a", b"42 (a) S", b"42 (a) S x", b"42 (a) S " + b"9" * 5000, b"\0" * 99])
def test_where_there_is_no_parent_it_is_0(stat: bytes) -> None:
    assert process.parse_parent(stat) == 0


def test_the_running_kernel_writes_it_so() -> None:
    before = Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    try:
        process.call_oneself("a) R 1\nTgid:\t1")
        assert process.parse_parent(Path("/proc/self/stat").read_bytes()) == os.getppid()
        assert process.parse_thread_group(Path("/proc/self/status").read_bytes()) == os.getpid()
    finally:
        process.call_oneself(before.decode())


@pytest.mark.parametrize("status", [b"", b"Name:\ta\n", b"Name:\tTgid:\t5\n", b"Tgid:\t" + b"9" * 5000 + b"\n"])
def test_where_there_is_no_thread_group_it_is_0(status: bytes) -> None:
    assert process.parse_thread_group(status) == 0


def test_a_thread_that_is_gone_has_no_thread_group() -> None:
    with pytest.raises(ProcessLookupError):
        pidfd.thread_group(pidfd.MAX_PID)


@pytest.mark.parametrize("fdinfo", [b"", b"flags:\t9\n", b"flags:\t" + b"7" * 5000 + b"\n", b"pos:\t0"])
def test_where_there_are_no_flags_there_are_none(fdinfo: bytes) -> None:
    assert carry.parse_flags(fdinfo) is None


@pytest.mark.parametrize("number", [b"9" * 5000, b"-5", b"0x5", b"5 5"])
def test_a_line_of_epolls_that_is_none_is_passed_over(number: bytes) -> None:
    good = b"tfd:        5 events:       19 data:                7  pos:0 ino:1 sdev:9\n"
    bad = b"tfd: " + number + b" events:       19 data:                7  pos:0 ino:1 sdev:9\n"
    assert carry.parse_watches(9, bad, frozenset({5}), 1) == []
    assert len(carry.parse_watches(9, bad + good, frozenset({5}), 1)) == 1


def test_an_epoll_instance_of_very_many_is_looked_through() -> None:
    with socket.socket() as sock, select.epoll() as epoll:
        others = [os.eventfd(0) for _ in range(400)]
        try:
            for fd in others:
                epoll.register(fd, select.EPOLLIN)
            epoll.register(sock.fileno(), select.EPOLLIN)
            found = carry.find(os.getpid(), os.fstat(sock.fileno()).st_ino, sock.fileno())
            assert [(watch.epoll, watch.fd) for watch in found.watches] == [(epoll.fileno(), sock.fileno())]
        finally:
            for fd in others:
                os.close(fd)
