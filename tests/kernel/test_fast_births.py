"""The compiled socket(2) of transport born with a real listener: what it answers, and what it leaves to Python."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import mmap
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from graft.datapath import layout
from graft.kernel.netns import unshare_netns
from graft.kernel.pidfd import pidfd_open_thread
from graft.kernel.process import User, switch_user
from graft.kernel.seccomp import Listener, Notification, install_listener
from graft.kernel.seccomp_filter import IPPROTO_MPTCP, architecture, born_filter
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state import call_times
from graft.swap import fast_calls
from graft.swap._fast_calls import FastCalls
from graft.swap.processes import Processes

TCP, UDP = (socket.AF_INET, socket.SOCK_STREAM, 0), (socket.AF_INET6, socket.SOCK_DGRAM, 17)
ROOT = (0, 0)
MAX_SPARES = 64
LAST = (socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)  # what a child ends with: never answered in C
BLANK = bytes(Listener.SIZE)


def make(family: int, kind: int, protocol: int) -> int:
    """socket(2) as the program calls it; gives a descriptor or a negative errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.socket(family, kind, protocol))
    return fd if fd >= 0 else -ctypes.get_errno()


@dataclass
class Child:
    """A forked process under the filter. It waits for `go` before it works; ``said`` is what its work gave."""

    pid: int
    listener: Listener
    fast: FastCalls
    control: socket.socket
    page: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, mmap.PAGESIZE))
    handed: list[Notification] = field(default_factory=list)
    said: Any = None

    def stock(self, kind: tuple[int, int, int], count: int = 1, owner: tuple[int, int] = ROOT) -> None:
        for _ in range(count):
            self.fast.add(*kind, *owner, socket.socket(*kind).detach())

    def know(self, tid: int = 0) -> None:
        """As the supervisor does once Python has served a thread."""
        pidfd = pidfd_open_thread(tid or self.pid)
        folder = os.open(f"/proc/{tid or self.pid}/fdinfo", os.O_RDONLY)
        self.fast.know(tid or self.pid, pidfd, folder)
        os.close(pidfd)
        os.close(folder)

    def know_and_resume(self, call: Notification) -> None:
        self.know(call.pid)
        self.listener.resume(call.id)

    def go(self, handle: Callable[[Notification], None] | None = None) -> None:
        """Serve it to its end. ``handle`` answers what is left to Python; otherwise the call runs in the child."""
        self.control.send(b"go")
        while True:
            handed = self.fast.serve(self.page)
            if not handed:
                assert self.page[: Listener.SIZE] == BLANK
                continue
            one = Notification.unpack(self.page[: Listener.SIZE])
            self.page[: Listener.SIZE] = BLANK
            if one.size == IPPROTO_MPTCP:
                self.listener.answer(one.id, errno.EPERM)
                break
            self.handed.append(one)
            (handle or (lambda call: self.listener.resume(call.id)))(one)
        self.said = json.loads(self.control.recv(65536))


def no_desk() -> bytearray:
    return bytearray(ctypes.sizeof(layout.DeskValue))


@contextlib.contextmanager
def child(
    work: Callable[[], object],
    arch: int | None = None,
    netns: str | None = None,
    more: str = "",
    desk: bytearray | None = None,
) -> Iterator[Child]:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            listener, _ = install_listener(born_filter())
            socket.send_fds(theirs, [b"l"], [listener])
            os.close(listener)
            theirs.recv(2)
            said = json.dumps(work()).encode()
            make(*LAST)
            theirs.send(said)
        finally:
            os._exit(0)
    theirs.close()
    _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    own_arch, numbers = architecture()
    name = (os.readlink(f"/proc/{pid}/ns/net") if netns is None else netns) + more
    fast = FastCalls(fd, arch or own_arch, desk or no_desk())
    fast.answer_births(numbers["socket"], name)
    try:
        yield Child(pid, Listener(fd), fast, ours)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)
        ours.close()


@pytest.fixture(autouse=True)
def can_serve(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fast_calls.NOT_COMPILED, raising=False)
    if reason := fast_calls.why_not(Transport.BORN):
        pytest.skip(reason)


def described(fd: int) -> list[int]:
    """Inode and flags of a descriptor."""
    if fd < 0:
        return [fd]
    with socket.socket(fileno=os.dup(fd)) as sock:
        numbers = [sock.family, sock.type, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)]
    return [os.fstat(fd).st_ino, *numbers, int(os.get_blocking(fd)), int(os.get_inheritable(fd))]


def inodes(count: int) -> list[int]:
    return [os.fstat(make(*TCP)).st_ino for _ in range(count)]


def test_a_known_thread_gets_the_spares_with_the_flags_that_it_asked_for() -> None:
    kinds = [
        TCP,
        (socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0),
        (socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 6),
        UDP,
    ]
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    with child(lambda: [described(make(*kind)) for kind in kinds]) as one:
        one.know()
        one.stock(TCP, 2)
        one.stock((socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 6))
        one.stock(UDP)
        open_sockets = {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
        one.go()
        assert one.handed == [] and one.fast.served == 4
    assert {made[0] for made in one.said} <= open_sockets
    assert [made[1:] for made in one.said] == [
        [2, 1, 6, 1, 1],
        [2, 1, 6, 1, 0],
        [2, 1, 6, 0, 0],
        [10, 2, 17, 1, 1],
    ]
    one.page.close()
    del one
    assert len(os.listdir("/proc/self/fd")) == before


def _is_open(fd: str) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_this_processs_copy_is_closed_before_the_next_call() -> None:
    """The other end sees the end of the stream as soon as the program closes it, though no other call comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def work() -> bool:
            with socket.socket(fileno=make(*TCP)) as sock:
                sock.connect(address)
            time.sleep(0.5)
            return True

        with child(work) as one:
            one.know()
            one.stock(TCP)
            thread = threading.Thread(target=one.go)
            thread.start()
            peer, _ = server.accept()
            peer.settimeout(0.4)
            assert peer.recv(1) == b""
            peer.close()
            thread.join()
            assert one.said is True and one.fast.served == 1


def test_each_call_that_is_answered_is_counted_by_how_long_it_took(tmp_path: Path) -> None:
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})
    timer = call_times.take(settings, 7)
    assert timer is not None
    with child(lambda: [make(*TCP) for _ in range(5)]) as one:
        one.fast.count_times(timer.slot)
        one.know()
        one.stock(TCP, 4)
        one.go()
        assert one.fast.served == 4 and len(one.handed) == 1
    found = call_times.read(settings, 7)
    assert found is not None and found.count == 4 and 4 * 1_000 < found.total < 4e9


def test_an_unknown_thread_and_one_without_a_spare_are_pythons() -> None:
    with child(lambda: inodes(3)) as one:
        one.stock(TCP)
        one.go(one.know_and_resume)
        assert [call.pid for call in one.handed] == [one.pid, one.pid]
        assert one.fast.served == 1
        assert len(set(one.said)) == 3


OTHERS = [
    (socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0),
    (socket.AF_INET6, socket.SOCK_STREAM, 0),
    (socket.AF_INET, socket.SOCK_STREAM, 6),
    (socket.AF_INET, socket.SOCK_DGRAM, 0),
]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_spare_serves_no_other_kind(kind: tuple[int, int, int]) -> None:
    with child(lambda: make(*kind) >= 0) as one:
        one.know()
        one.stock(TCP)
        one.go()
        assert [(call.fd, call.size) for call in one.handed] == [(kind[0], kind[2])]
        assert one.fast.count(*TCP, *ROOT) == 1 and one.said is True


def test_a_thread_of_another_user_does_not_get_roots_spare() -> None:
    def work() -> list[int]:
        first = os.fstat(make(*TCP)).st_uid
        switch_user(User(5, 7, (7,)))
        made = os.fstat(make(*TCP)), os.fstat(make(*TCP))
        return [first, *(number for status in made for number in (status.st_uid, status.st_gid))]

    with child(work) as one:
        one.know()
        one.stock(TCP, 2)
        others = [(5, 8), (5, 0), (0, 7), (8, 7)]
        for other in others:
            one.stock(TCP, 1, other)
        one.go()
        assert len(one.handed) == 2 and one.said == [0, 5, 7, 5, 7]
        assert (one.fast.count(*TCP, *ROOT), one.fast.served) == (1, 1)
        assert [one.fast.count(*TCP, *other) for other in others] == [1] * 4


def test_a_thread_in_a_namespace_that_it_entered_is_pythons() -> None:
    def work() -> int:
        made = make(*TCP)
        unshare_netns()
        return min(made, make(*TCP))

    with child(work) as one:
        one.know()
        one.stock(TCP, 2)
        one.go()
        assert (len(one.handed), one.fast.served, one.fast.count(*TCP, *ROOT)) == (1, 1, 1)


@pytest.mark.parametrize("wrong", [{"netns": "net:[1]"}, {"more": "9"}, {"arch": 0x40000003}])
def test_another_namespace_and_another_architecture_are_pythons(wrong: Any) -> None:
    with child(lambda: make(*TCP) >= 0, **wrong) as one:
        one.know()
        one.stock(TCP)
        one.go()
        assert len(one.handed) == 1 and one.fast.served == 0 and one.said is True


def test_a_call_that_cannot_have_a_descriptor_is_pythons_and_keeps_the_spare() -> None:
    def work() -> list[int]:
        limit = max(map(int, os.listdir("/proc/self/fd"))) + 4
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        copies = []
        with contextlib.suppress(OSError):
            while True:
                copies.append(os.dup(0))
        full = make(*TCP)
        os.close(copies[-1])
        return [full, make(*TCP) == copies[-1]]

    with child(work) as one:
        one.know()
        one.stock(TCP)
        one.go()
        assert len(one.handed) == 1 and one.fast.served == 1
        assert one.said == [-errno.EMFILE, True]


def test_a_pidfd_of_a_thread_that_has_ended_is_forgotten() -> None:
    other = os.fork()
    if other == 0:
        signal.pause()
    pidfd, folder = os.pidfd_open(other), os.open(f"/proc/{other}/fdinfo", os.O_RDONLY)
    with child(lambda: inodes(2)) as one:
        one.stock(TCP, 2)
        one.fast.know(one.pid, pidfd, folder)  # as if its id had been that thread's
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        gc.collect()  # what other tests left
        before = len(os.listdir("/proc/self/fd"))
        one.go(one.know_and_resume)
        assert (len(one.handed), one.fast.served) == (1, 1)
        assert len(os.listdir("/proc/self/fd")) == before - 1  # two for two, and a spare
    os.close(pidfd)
    os.close(folder)


def test_a_thread_is_not_taken_for_another_one_that_is_known() -> None:
    with child(lambda: make(*TCP) >= 0) as one:
        pidfd, folder = os.pidfd_open(one.pid), os.open(f"/proc/{one.pid}/fdinfo", os.O_RDONLY)
        for distance in range(1, 1025):  # wherever it is remembered
            one.fast.know(one.pid + distance, pidfd, folder)
        one.stock(TCP)
        one.go()
        assert len(one.handed) == 1 and one.fast.served == 0
        os.close(pidfd)
        os.close(folder)


def test_mptcp_is_pythons_whatever_is_in_stock() -> None:
    with child(lambda: True) as one:
        one.know()
        one.fast.add(*LAST, *ROOT, os.open(os.devnull, os.O_RDONLY))
        one.go()
        assert one.fast.served == 0 and one.fast.count(*LAST, *ROOT) == 1


def test_many_threads_are_served() -> None:
    def work() -> int:
        def one_socket() -> None:
            for _ in range(5):
                found.append(os.fstat(make(*TCP)).st_ino)

        found: list[int] = []
        for _ in range(10):
            threads = [threading.Thread(target=one_socket) for _ in range(30)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return len(set(found))

    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(Processes()) as processes, child(work) as one:

        def handle(call: Notification) -> None:
            with contextlib.suppress(OSError):
                processes.caller(call.pid)
                processes.show(call.pid, one.fast.know)
            one.listener.resume(call.id)
            one.stock(TCP, 16 - one.fast.count(*TCP, *ROOT))

        one.go(handle)
        assert one.said == 1500
        assert one.fast.served + len(one.handed) == 1500 and one.fast.served > 500
        assert len(os.listdir("/proc/self/fd")) < before + 2 * 256 + 2 * 128 + 32


def test_a_signal_ends_the_wait_and_leaves_the_page_zero() -> None:
    """So the watcher of the end stops a supervisor, one that is never without a call too."""
    with child(lambda: len(inodes(MAX_SPARES + 1))) as one:
        one.know()
        before = signal.signal(signal.SIGUSR1, lambda *_: None)
        try:
            timer = threading.Timer(
                0.2, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            )
            timer.start()
            assert one.fast.serve(one.page) is False and one.page[: Listener.SIZE] == BLANK
            timer.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
        one.control.send(b"go")
        for _ in range(4):
            one.stock(TCP, MAX_SPARES)
        returned = 0
        while not one.fast.serve(one.page):
            returned += 1
            one.stock(TCP, MAX_SPARES)
        assert one.fast.served == MAX_SPARES


def test_without_the_hook_no_spare_is_made_here() -> None:
    """A socket without a tag would be no container's."""
    desk = no_desk()
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    with child(lambda: inodes(2), desk=desk) as one:
        one.know()
        one.fast.make_spares(16)
        one.stock(TCP)
        one.go()
        assert (one.fast.served, len(one.handed), one.fast.count(*TCP, *ROOT)) == (1, 1, 0)
        assert desk[layout.DeskValue.next_home.offset] == 0
    del one
    assert len(os.listdir("/proc/self/fd")) == before
