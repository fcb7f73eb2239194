"""No twin leaves its birthplace without a tag, whoever wrote it."""

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
    """As graft.swap.socket_pool.NamespaceSwitch, and remembers where it was."""

    home_cookie = HERE

    def __init__(self) -> None:
        self.entered: list[int] = []

    @contextlib.contextmanager
    def inside(self, cookie: int) -> Iterator[None]:
        self.entered.append(cookie)
        yield


class Tags:
    """The map, and what was written from user space."""

    def __init__(self) -> None:
        self.put_for: list[tuple[int, int, int]] = []
        self.fails = False

    def put(self, key: ctypes.c_int32, value: layout.Tag) -> None:
        if self.fails:
            raise OSError(12, "no memory")
        self.put_for.append((key.value, value.container, value.home))


def born(monkeypatch: pytest.MonkeyPatch, hook: bool) -> tuple[SocketPool, Tags, Namespaces, list[int]]:
    """A maker of twins, with or without a hook that tags; what the hook was told."""
    next_home, told, made = bytearray(1), [], _socket.socket

    def make(*arguments: int) -> Any:
        told.append(next_home[0])
        if hook:
            next_home[0] = 0
        return made(*arguments)

    monkeypatch.setattr(socket_pool, "Socket", make)
    tags, namespaces = Tags(), Namespaces()
    maker: Any = SocketPool
    return maker(tags, SimpleNamespace(next_home=next_home), 7, namespaces), tags, namespaces, told


def test_a_hook_that_tags_spares_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, tags, namespaces, told = born(monkeypatch, hook=True)
    maker.take(Home.HOST, HERE, 4, 6).close()
    maker.take(Home.CONTAINER, ELSEWHERE, 6, 6).close()
    assert (tags.put_for, namespaces.entered, told) == ([], [ELSEWHERE], [Home.HOST + 1, Home.CONTAINER + 1])


def test_where_no_hook_tags_the_map_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, tags, _, _ = born(monkeypatch, hook=False)
    twin = maker.take(Home.HOST, HERE, 4, 6)
    assert tags.put_for == [(twin.fileno(), 7, Home.HOST)]
    assert twin.family == socket.AF_INET
    twin.close()


def test_a_twin_that_cannot_be_tagged_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, tags, _, _ = born(monkeypatch, hook=False)
    tags.fails = True
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no memory"):
        maker.take(Home.HOST, HERE, 4, 6)
    maker.refill()
    assert os.listdir("/proc/self/fd") == before


def test_some_are_made_ahead_like_the_one_that_was_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, _, _, told = born(monkeypatch, hook=True)
    taken = [maker.take(Home.HOST, HERE, 4, 6)]
    maker.refill()
    made = len(told)
    assert made > 2
    while len(taken) < made:
        taken.append(maker.take(Home.HOST, HERE, 4, 6))
        maker.refill()
    assert len(told) == made
    taken.append(maker.take(Home.HOST, HERE, 6, 6))
    assert len(told) == made + 1
    for twin in taken:
        twin.close()
