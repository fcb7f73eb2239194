"""Processes as /proc shows them, where the program has chosen the name."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import pytest

from graft.kernel import pidfd, process, tasks
from graft.swap import descriptors

NAMES = [b"nginx", b"a b", b") R 1 1", b"(", b")", b"x\nPPid:\t1", b"\xff\xfe", b"", b"1) S 99 (2"]


REST = b"State:\tD (disk sleep)\nPPid:\t7\nvoluntary_ctxt_switches:\t3\nnonvoluntary_ctxt_switches:\t4\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_parent_is_found_behind_any_name(name: bytes) -> None:
    status = b"Name:\t" + name.replace(b"\n", b"\\n") + b"\n" + REST
    assert tasks.parse_activity(status) == tasks.Activity("D", 7, 7)


@pytest.mark.parametrize(
    "status", [b"", b"Name:\ta\n", REST[:-4], REST.replace(b"7", b"x"), REST.replace(b"7", b"9" * 5000), b"\0" * 99]
)
def test_where_there_is_no_parent_there_is_no_answer(status: bytes) -> None:
    assert tasks.parse_activity(status) is None


def test_the_running_kernel_writes_it_so() -> None:
    before = Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    try:
        process.call_oneself("a) R 1\nTgid:\t1")
        activity = tasks.activity(os.getpid())
        assert activity is not None and activity.parent == os.getppid()
        assert tasks.parse_thread_group(Path("/proc/self/status").read_bytes()) == os.getpid()
    finally:
        process.call_oneself(before.decode())


@pytest.mark.parametrize("status", [b"", b"Name:\ta\n", b"Name:\tTgid:\t5\n", b"Tgid:\t" + b"9" * 5000 + b"\n"])
def test_where_there_is_no_thread_group_it_is_0(status: bytes) -> None:
    assert tasks.parse_thread_group(status) == 0


def test_a_thread_that_is_gone_has_no_thread_group() -> None:
    with pytest.raises(ProcessLookupError):
        pidfd.thread_group(pidfd.MAX_PID)


@pytest.mark.parametrize("fdinfo", [b"", b"flags:\t9\n", b"flags:\t" + b"7" * 5000 + b"\n", b"pos:\t0"])
def test_where_there_are_no_flags_there_are_none(fdinfo: bytes) -> None:
    assert descriptors.parse_flags(fdinfo) is None


@pytest.mark.parametrize("number", [b"9" * 5000, b"-5", b"0x5", b"5 5"])
def test_a_line_of_epolls_that_is_none_is_passed_over(number: bytes) -> None:
    good = b"tfd:        5 events:       19 data:                7  pos:0 ino:1 sdev:9\n"
    bad = b"tfd: " + number + b" events:       19 data:                7  pos:0 ino:1 sdev:9\n"
    assert descriptors.parse_registrations(9, bad, frozenset({5}), 1) == []
    assert len(descriptors.parse_registrations(9, bad + good, frozenset({5}), 1)) == 1


def test_an_epoll_instance_of_very_many_is_looked_through() -> None:
    with socket.socket() as sock, select.epoll() as epoll:
        others = [os.eventfd(0) for _ in range(400)]
        try:
            for fd in others:
                epoll.register(fd, select.EPOLLIN)
            epoll.register(sock.fileno(), select.EPOLLIN)
            found = descriptors.find(os.getpid(), os.fstat(sock.fileno()).st_ino, sock.fileno())
            assert [(watch.epoll, watch.fd) for watch in found.watches] == [(epoll.fileno(), sock.fileno())]
        finally:
            for fd in others:
                os.close(fd)
