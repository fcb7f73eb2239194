"""A child of graftd's keeper gets its descriptors when it has looked up its names; one that cannot is left behind."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from graft.keeper import own_names, prepared
from graft.keeper.prepared import Forks
from tests.support.wait import PATIENCE, until

SECONDS = 0.2 * PATIENCE


@pytest.fixture
def says() -> Iterator[tuple[int, int]]:
    """A pipe, by which a child says something: reader, writer."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """While this FIFO is there, a child waits in it where it looks its names up, and notes its descriptors before."""
    path, pin = tmp_path / "gate", own_names.pin
    os.mkfifo(path)

    def wait_there(inherited: int = 0) -> None:
        if path.exists():
            (tmp_path / f"open-{os.getpid()}").write_text(" ".join(os.listdir("/proc/self/fd")))
            os.close(os.open(path, os.O_RDONLY))
        pin(inherited)

    monkeypatch.setattr(own_names, "pin", wait_there)
    yield path


def writes_numbers(fds: Sequence[int]) -> None:
    """To the last descriptor: the inodes of the others, in their order."""
    os.write(fds[-1], " ".join(str(os.fstat(fd).st_ino) for fd in fds[:-1]).encode())
    os._exit(7)


def none_left(forks: Forks) -> bool:
    """Whether all that were left behind are reaped."""
    forks._reap()
    return not forks._left


def said_of(forks: Forks, fds: Sequence[int], says: tuple[int, int]) -> str:
    """What a child says that gets ``fds``."""
    pid = forks.start([*fds, says[1]], writes_numbers)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    return os.read(says[0], 1 << 16).decode() if select.select([says[0]], [], [], 0)[0] else ""


@pytest.mark.parametrize("count", [0, 1, 252, 253, 1000])
def test_all_descriptors_arrive_in_their_order(count: int, says: tuple[int, int]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    files = [os.memfd_create(f"file-{number}") for number in range(count)]
    try:
        assert said_of(Forks(), files, says).split() == [str(os.fstat(fd).st_ino) for fd in files]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in files:
            os.close(fd)


def test_as_many_as_graftd_can_store_arrive(says: tuple[int, int]) -> None:
    """26,000, or as many as a process may have here."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    count = min(26_000, limits[1] - 200)
    start = os.open("/dev/null", os.O_RDONLY)
    copies = [os.dup(start) for _ in range(count)]

    def counts(fds: Sequence[int]) -> None:
        os.write(fds[-1], str(len(set(fds))).encode())

    try:
        os.waitpid(Forks().start([*copies, says[1]], counts), 0)
        assert os.read(says[0], 100).decode() == str(count + 1)
    finally:
        for fd in (start, *copies):
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_one_that_waits_is_left_behind_with_nothing_open_and_the_next_one_is_started(
    gate: Path, says: tuple[int, int]
) -> None:
    forks, (reader, writer) = Forks(SECONDS), os.pipe()
    with pytest.raises(TimeoutError) as raised:
        forks.start([writer], writes_numbers)
    assert raised.value.errno == errno.ETIMEDOUT and "waits in the kernel" in str(raised.value)
    [held] = forks._left
    opened = set((gate.parent / f"open-{held}").read_text().split())
    assert len(opened - {"0", "1", "2"}) == 2  # its end of the socketpair, and the folder that was listed
    os.close(writer)
    assert os.read(reader, 1) == b""  # nobody else has it
    os.close(reader)
    gate.unlink()
    with open("/dev/null") as file:
        assert said_of(forks, [file.fileno()], says) == str(os.fstat(file.fileno()).st_ino)
    until("it is reaped", lambda: none_left(forks))


def test_each_try_may_take_longer_up_to_a_limit(gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_LONGEST_SECONDS", 5 * 0.01)
    forks, given = Forks(0.01), []
    hand_over = prepared._hand_over

    def noting(child: object, fds: Sequence[int], seconds: float) -> None:
        given.append(seconds)
        hand_over(child, fds, seconds)  # type: ignore[arg-type]

    monkeypatch.setattr(prepared, "_hand_over", noting)
    for _ in range(5):
        with pytest.raises(TimeoutError):
            forks.start([], writes_numbers)
    assert given == [0.01, 0.02, 0.04, 0.05, 0.05]


def test_no_more_are_left_behind_than_that(gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they cannot be reaped; here nobody kills them."""
    monkeypatch.setattr(prepared, "MAX_LEFT", 2)
    kill: Callable[[int, int], None] = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, signum: None)
    forks = Forks(SECONDS)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            forks.start([], writes_numbers)
    with pytest.raises(BlockingIOError, match="2 children"):  # EAGAIN
        forks.start([], writes_numbers)
    for pid in forks._left:
        kill(pid, signal.SIGKILL)
    until("they are reaped", lambda: none_left(forks))
    gate.unlink()
    assert os.waitpid(forks.start([os.open("/dev/null", os.O_WRONLY)], writes_numbers), 0)


def test_one_that_dies_before_it_has_anything_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_names, "pin", lambda inherited=0: os._exit(1))
    forks = Forks()
    with pytest.raises(OSError, match="has ended"):
        forks.start([], writes_numbers)
    until("it is reaped", lambda: none_left(forks))


def test_one_whose_keeper_has_died_does_nothing(says: tuple[int, int]) -> None:
    """Its names are in the cache, and nobody sends anything."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            prepared._be_child(theirs, 1, lambda fds: os._exit(7))
        assert ours.recv(1) == b"."
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
