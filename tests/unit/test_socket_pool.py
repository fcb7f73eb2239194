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
from graft.swap.socket_pool import SocketPool

HERE, ELSEWHERE = 1, 2


class Namespaces:
    """As graft.swap.socket_pool.NamespaceSwitch; records which namespaces were entered."""

    home_cookie = HERE

    def __init__(self) -> None:
        self.entered: list[int] = []

    @contextlib.contextmanager
    def inside(self, cookie: int) -> Iterator[None]:
        self.entered.append(cookie)
        yield


class Tags:
    """The map of tags; records what was written from user space."""

    def __init__(self) -> None:
        self.put_for: list[tuple[int, int, int]] = []
        self.fails = False

    def put(self, key: ctypes.c_int32, value: layout.Tag) -> None:
        if self.fails:
            raise OSError(12, "no memory")
        self.put_for.append((key.value, value.container, value.home))


def pool_of(monkeypatch: pytest.MonkeyPatch, hook: bool) -> tuple[SocketPool, Tags, Namespaces, list[int]]:
    """A pool, with or without a hook that tags, and the homes that the hook was given, one for each socket made."""
    next_home, homes, make_socket = bytearray(1), [], _socket.socket

    def make(*arguments: int) -> Any:
        homes.append(next_home[0])
        if hook:
            next_home[0] = 0
        return make_socket(*arguments)

    monkeypatch.setattr(socket_pool, "Socket", make)
    tags, namespaces = Tags(), Namespaces()
    make_pool: Any = SocketPool
    return make_pool(tags, SimpleNamespace(next_home=next_home), 7, namespaces), tags, namespaces, homes


def test_where_a_hook_tags_the_map_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tags, namespaces, homes = pool_of(monkeypatch, hook=True)
    pool.take(Home.HOST, HERE, 4, 6).close()
    pool.take(Home.CONTAINER, ELSEWHERE, 6, 6).close()
    assert (tags.put_for, namespaces.entered, homes) == ([], [ELSEWHERE], [Home.HOST + 1, Home.CONTAINER + 1])


def test_where_no_hook_tags_the_map_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tags, _, _ = pool_of(monkeypatch, hook=False)
    sock = pool.take(Home.HOST, HERE, 4, 6)
    assert tags.put_for == [(sock.fileno(), 7, Home.HOST)]
    assert sock.family == socket.AF_INET
    sock.close()


def test_a_socket_that_cannot_be_tagged_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tags, _, _ = pool_of(monkeypatch, hook=False)
    tags.fails = True
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no memory"):
        pool.take(Home.HOST, HERE, 4, 6)
    pool.refill()
    assert os.listdir("/proc/self/fd") == before


def test_more_sockets_like_the_missing_one_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, _, homes = pool_of(monkeypatch, hook=True)
    taken = [pool.take(Home.HOST, HERE, 4, 6)]
    pool.refill()
    made = len(homes)
    assert made > 2
    while len(taken) < made:
        taken.append(pool.take(Home.HOST, HERE, 4, 6))
        pool.refill()
    assert len(homes) == made
    taken.append(pool.take(Home.HOST, HERE, 6, 6))
    assert len(homes) == made + 1
    for sock in taken:
        sock.close()
