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

from graft import births, layout
from graft.births import Births
from graft.layout import Home

HERE, ELSEWHERE = 1, 2


class Namespaces:
    """As graft.births.Namespaces, and remembers where it was."""

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


def born(monkeypatch: pytest.MonkeyPatch, hook: bool) -> tuple[Births, Tags, Namespaces, list[int]]:
    """A maker of twins, with or without a hook that tags; what the hook was told."""
    birth, told, made = bytearray(1), [], _socket.socket

    def make(*arguments: int) -> Any:
        told.append(birth[0])
        if hook:
            birth[0] = 0
        return made(*arguments)

    monkeypatch.setattr(births, "Socket", make)
    tags, namespaces = Tags(), Namespaces()
    maker: Any = Births
    return maker(tags, SimpleNamespace(birth=birth), 7, namespaces), tags, namespaces, told


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


def test_a_twin_is_made_as_its_programs_user(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, _, _, _ = born(monkeypatch, hook=True)
    now: list[births.Owner] = [births.ROOT]
    made: list[births.Owner] = []

    @contextlib.contextmanager
    def owning(uid: int, gid: int) -> Iterator[None]:
        now.append((uid, gid))
        yield
        now.pop()

    def make(*_: object) -> Any:
        made.append(now[-1])
        return SimpleNamespace(owner=now[-1], close=lambda: None)

    monkeypatch.setattr(births, "owning_files_as", owning)
    monkeypatch.setattr(maker, "_make", make)
    for user in (5, 6, 5, 5, 0, 6):
        twin: Any = maker.take(Home.HOST, HERE, 4, 6, (user, 7))
        assert twin.owner == (user, 7)
        maker.refill()
    twin = maker.take(Home.CONTAINER, ELSEWHERE, 4, 6, (8, 9))
    assert twin.owner == (8, 9)


def test_a_container_of_many_users_has_few_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, _, _, _ = born(monkeypatch, hook=True)
    monkeypatch.setattr(births, "owning_files_as", lambda *_: contextlib.nullcontext())
    before = len(os.listdir("/proc/self/fd"))
    for user in range(200):
        maker.take(Home.HOST, HERE, 4, 6, (user, 0)).close()
        maker.refill()
    assert len(os.listdir("/proc/self/fd")) < before + 100
