"""Every replacement socket has a tag, written by the hook or from user space."""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from graft.datapath import layout
from graft.model.transport import Home
from graft.swap import socket_pool
from graft.swap.socket_pool import ROOT, Owner, SocketKind, SocketPool

HERE, ELSEWHERE = 1, 2


def kind(family: int, owner: Owner = ROOT) -> SocketKind:
    """A kind of TCP socket."""
    return SocketKind(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM, 6, owner)


class Namespaces:
    """As graft.swap.socket_pool.NamespaceSwitch, and records which namespaces it entered."""

    host_cookie = HERE

    def __init__(self) -> None:
        self.entered: list[int] = []

    @contextlib.contextmanager
    def inside(self, cookie: int) -> Iterator[None]:
        self.entered.append(cookie)
        yield


class Tags:
    """The map of tags, and what user space wrote to it."""

    def __init__(self) -> None:
        self.put_for: list[tuple[int, int, int]] = []
        self.fails = False

    def put(self, key: ctypes.c_int32, value: layout.Tag) -> None:
        if self.fails:
            raise OSError(12, "no memory")
        self.put_for.append((key.value, value.container, value.home))


def make_pool(monkeypatch: pytest.MonkeyPatch, hook: bool) -> tuple[SocketPool, Tags, Namespaces, list[int]]:
    """A pool, with or without a hook that tags, and the values of next_home when a socket was made."""
    next_home, seen, make_socket = bytearray(1), [], _socket.socket

    def make(*arguments: int) -> Any:
        seen.append(next_home[0])
        if hook:
            next_home[0] = 0
        return make_socket(*arguments)

    monkeypatch.setattr(socket_pool, "Socket", make)
    tags, namespaces = Tags(), Namespaces()
    pool_type: Any = SocketPool
    return pool_type(tags, SimpleNamespace(next_home=next_home), 7, namespaces), tags, namespaces, seen


def test_where_the_hook_tags_the_map_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tags, namespaces, seen = make_pool(monkeypatch, hook=True)
    pool.get(Home.HOST, HERE, kind(4)).close()
    pool.get(Home.CONTAINER, ELSEWHERE, kind(6)).close()
    assert (tags.put_for, namespaces.entered, seen) == ([], [ELSEWHERE], [Home.HOST + 1, Home.CONTAINER + 1])


def test_where_no_hook_tags_the_map_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tags, _, _ = make_pool(monkeypatch, hook=False)
    sock = pool.get(Home.HOST, HERE, kind(4))
    assert tags.put_for == [(sock.fileno(), 7, Home.HOST)]
    assert sock.family == socket.AF_INET
    sock.close()


def test_a_socket_that_cannot_be_tagged_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tags, _, _ = make_pool(monkeypatch, hook=False)
    tags.fails = True
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no memory"):
        pool.get(Home.HOST, HERE, kind(4))
    pool.refill()
    assert os.listdir("/proc/self/fd") == before


def test_spares_are_made_of_the_kind_that_was_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, _, seen = make_pool(monkeypatch, hook=True)
    taken = [pool.get(Home.HOST, HERE, kind(4))]
    pool.refill()
    made = len(seen)
    assert made > 2
    while len(taken) < made:
        taken.append(pool.get(Home.HOST, HERE, kind(4)))
        pool.refill()
    assert len(seen) == made
    taken.append(pool.get(Home.HOST, HERE, kind(6)))
    assert len(seen) == made + 1
    for sock in taken:
        sock.close()


def test_a_socket_is_made_as_its_programs_user(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, _, _ = make_pool(monkeypatch, hook=True)
    now: list[socket_pool.Owner] = [socket_pool.ROOT]

    @contextlib.contextmanager
    def owning(uid: int, gid: int) -> Iterator[None]:
        now.append((uid, gid))
        yield
        now.pop()

    def make(*_: object) -> Any:
        return SimpleNamespace(owner=now[-1], close=lambda: None)

    monkeypatch.setattr(socket_pool, "owning_files_as", owning)
    monkeypatch.setattr(pool, "_make", make)
    for user in (5, 6, 5, 5, 0, 6):
        made: Any = pool.get(Home.HOST, HERE, kind(4, (user, 7)))
        assert made.owner == (user, 7)
        pool.refill()
    made = pool.get(Home.CONTAINER, ELSEWHERE, kind(4, (8, 9)))
    assert made.owner == (8, 9)


def test_a_container_of_many_users_has_few_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, _, _ = make_pool(monkeypatch, hook=True)
    monkeypatch.setattr(socket_pool, "owning_files_as", lambda *_: contextlib.nullcontext())
    before = len(os.listdir("/proc/self/fd"))
    for user in range(200):
        pool.get(Home.HOST, HERE, kind(4, (user, 0))).close()
        pool.refill()
    assert len(os.listdir("/proc/self/fd")) < before + 100
