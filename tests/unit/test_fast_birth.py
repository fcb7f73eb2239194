"""The compiled part of transport born, as far as it goes without a listener: its stock, the threads that it knows."""

from __future__ import annotations

import mmap
import os
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from graft.swap import fast_birth
from graft.swap._fast_birth import FastBirth
from graft.swap.fast_birth import CompiledStock
from graft.swap.socket_pool import SocketKind

TCP = (socket.AF_INET, socket.SOCK_STREAM, 6, 0, 0)
UDP = (socket.AF_INET, socket.SOCK_DGRAM, 0, 0, 0)
MAX_SPARES, MAX_CALLERS = 64, 128


@pytest.fixture
def fast() -> Iterator[FastBirth]:
    yield FastBirth(-1, "net:[1]", 0xC000003E, 41)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def new() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def own_thread() -> tuple[int, int]:
    """A pidfd and an fdinfo folder."""
    return os.pidfd_open(os.getpid()), os.open("/proc/self/fdinfo", os.O_RDONLY)


def test_a_spare_is_taken_by_its_kind_and_owner_only(fast: FastBirth) -> None:
    fd = new()
    fast.add(*TCP, fd)
    for at, other in enumerate((10, 2, 0, 5, 7)):
        kind: Any = [*TCP[:at], other, *TCP[at + 1 :]]
        assert (fast.count(*kind), fast.take(*kind)) == (0, -1)
    assert (fast.count(*TCP), fast.take(*TCP), fast.count(*TCP), fast.take(*TCP)) == (1, fd, 0, -1)
    os.close(fd)


def test_the_stock_is_bounded_and_the_oldest_go(fast: FastBirth) -> None:
    before = len(descriptors())
    for _ in range(3):
        fast.add(*UDP, new())
    for _ in range(MAX_SPARES):
        fast.add(*TCP, new())
    assert (fast.count(*UDP), fast.count(*TCP)) == (0, MAX_SPARES)
    assert len(descriptors()) == before + MAX_SPARES


def test_the_threads_that_are_known_are_bounded_and_the_descriptors_are_its_own(fast: FastBirth) -> None:
    pidfd, fdinfo = own_thread()
    before = len(descriptors())
    for tid in range(1, 4 * MAX_CALLERS):
        fast.know(tid, pidfd, fdinfo)
        fast.know(tid, pidfd, fdinfo)
    assert len(descriptors()) == before + 2 * MAX_CALLERS
    os.close(pidfd)
    os.close(fdinfo)


def test_a_thread_that_cannot_be_looked_up_leaves_nothing_behind(fast: FastBirth) -> None:
    pidfd, fdinfo = own_thread()
    before = descriptors()
    with pytest.raises(OSError, match="Bad file"):
        fast.know(1, -1, fdinfo)
    with pytest.raises(OSError, match="Bad file"):
        fast.know(1, pidfd, -1)
    with pytest.raises(OSError, match="No such file"):
        fast.know(1, pidfd, pidfd_folder := os.open("/", os.O_RDONLY))
    os.close(pidfd_folder)
    assert descriptors() == before
    os.close(pidfd)
    os.close(fdinfo)


def test_all_is_closed_and_released_with_the_object() -> None:
    before, types = descriptors(), sys.getrefcount(FastBirth)
    byte = bytearray(1)
    references = sys.getrefcount(byte)
    pidfd, fdinfo = own_thread()
    for _ in range(50):
        fast = FastBirth(-1, "net:[1]", 1, 1)
        fast.make_spares(byte, 1, 16)
        fast.make_spares(byte, 1, 16)
        fast.add(*TCP, new())
        fast.know(7, pidfd, fdinfo)
    del fast
    os.close(pidfd)
    os.close(fdinfo)
    assert (descriptors(), sys.getrefcount(FastBirth), sys.getrefcount(byte)) == (before, types, references)
    byte.append(0)  # nothing has its memory any more


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1, "", 1, 1), ValueError),
        ((-1, "n" * 64, 1, 1), ValueError),
        ((-1, "net:[1]"), TypeError),
        (("x", "net:[1]", 1, 1), TypeError),
    ],
)
def test_what_is_no_container_is_refused(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        FastBirth(*arguments)


def test_what_is_no_page_is_refused(fast: FastBirth) -> None:
    pages: tuple[Any, ...] = (bytearray(79), bytes(80), None)
    for page, error in zip(pages, (ValueError, BufferError, TypeError), strict=True):
        with pytest.raises(error):
            fast.serve(page)


def test_an_error_of_the_listener_is_raised(fast: FastBirth) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page, pytest.raises(OSError, match="Bad file"):
        fast.serve(page)


@pytest.mark.parametrize("arguments", [(bytearray(2), 1, 1), (bytearray(1), 0, 1), (bytearray(1), 1, 65)])
def test_what_cannot_make_spares_is_refused(fast: FastBirth, arguments: Any) -> None:
    with pytest.raises(ValueError):
        fast.make_spares(*arguments)


def test_a_stock_is_filled_for_the_pool_and_gives_sockets(fast: FastBirth) -> None:
    kind = SocketKind(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 6, (5, 7))
    stock, before = CompiledStock(fast), len(descriptors())
    assert stock.take(kind) is None
    for _ in range(2):
        stock.fill(kind, lambda: socket.socket(*kind[:3]))
    assert fast.count(*kind[:3], 5, 7) == len(descriptors()) - before == 16
    taken = stock.take(kind)
    assert taken is not None and taken.family == socket.AF_INET6 and fast.count(*kind[:3], 5, 7) == 15
    taken.close()


def test_plain_python_serves_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    desk: Any = SimpleNamespace(next_home=bytearray(1))
    monkeypatch.delenv(fast_birth.NOT_COMPILED, raising=False)
    monkeypatch.setattr(fast_birth, "_tells_ids", lambda: True)
    assert fast_birth.why_not() == "" and fast_birth.open_fast_birth(-1, "net:[1]", desk)
    assert fast_birth.open_fast_birth(-1, "", desk) is None
    monkeypatch.setenv(fast_birth.NOT_COMPILED, "1")
    assert "GRAFT_NO_COMPILED" in fast_birth.why_not() and fast_birth.open_fast_birth(-1, "net:[1]", desk) is None


def test_plain_python_serves_where_a_part_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fast_birth.NOT_COMPILED, raising=False)
    monkeypatch.setattr(fast_birth, "_tells_ids", lambda: False)
    assert "6.13" in fast_birth.why_not()
    monkeypatch.setitem(sys.modules, "graft.swap._fast_birth", None)
    monkeypatch.delattr("graft.swap._fast_birth")
    assert "compiler" in fast_birth.why_not()
