"""Parsing /proc of a process whose program chose its name."""

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
def test_a_status_without_a_parent_is_none(status: bytes) -> None:
    assert tasks.parse_activity(status) is None


def test_the_running_kernels_status_is_read() -> None:
    before = Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    try:
        process.set_process_name("a) R 1\nTgid:\t1")
        activity = tasks.activity(os.getpid())
        assert activity is not None and activity.parent == os.getppid()
        assert tasks.parse_thread_group(Path("/proc/self/status").read_bytes()) == os.getpid()
    finally:
        process.set_process_name(before.decode())


@pytest.mark.parametrize("status", [b"", b"Name:\ta\n", b"Name:\tTgid:\t5\n", b"Tgid:\t" + b"9" * 5000 + b"\n"])
def test_a_status_without_a_thread_group_is_0(status: bytes) -> None:
    assert tasks.parse_thread_group(status) == 0


def test_a_thread_that_has_ended_has_no_thread_group() -> None:
    with pytest.raises(ProcessLookupError):
        pidfd.thread_group(pidfd.MAX_PID)


@pytest.mark.parametrize("fdinfo", [b"", b"flags:\t9\n", b"flags:\t" + b"7" * 5000 + b"\n", b"pos:\t0"])
def test_fdinfo_without_flags_is_none(fdinfo: bytes) -> None:
    assert descriptors.parse_flags(fdinfo) is None


@pytest.mark.parametrize("number", [b"9" * 5000, b"-5", b"0x5", b"5 5"])
def test_a_malformed_epoll_line_is_skipped(number: bytes) -> None:
    good = b"tfd:        5 events:       19 data:                7  pos:0 ino:1 sdev:9\n"
    bad = b"tfd: " + number + b" events:       19 data:                7  pos:0 ino:1 sdev:9\n"
    assert descriptors.parse_registrations(9, bad, frozenset({5}), 1) == []
    assert len(descriptors.parse_registrations(9, bad + good, frozenset({5}), 1)) == 1


def test_a_registration_among_very_many_is_found() -> None:
    with socket.socket() as sock, select.epoll() as epoll:
        others = [os.eventfd(0) for _ in range(400)]
        try:
            for fd in others:
                epoll.register(fd, select.EPOLLIN)
            epoll.register(sock.fileno(), select.EPOLLIN)
            found = descriptors.find_references(os.getpid(), os.fstat(sock.fileno()).st_ino, sock.fileno())
            assert [(one.epoll, one.fd) for one in found.registrations] == [(epoll.fileno(), sock.fileno())]
        finally:
            for fd in others:
                os.close(fd)
