"""Whose sockets a ferry stands in for."""

from __future__ import annotations

from typing import Any

import pytest

from graft.datapath import layout
from graft.swap import ferry_owners
from graft.swap.ferry_owners import NOBODY, FerryOwners, HostSockets
from graft.swap.socket_pool import Owner

Place = tuple[int, str, int]
ONE, OTHER = (1000, 100), (1001, 101)


class Found:
    """Those of the host, and how often they were asked for."""

    def __init__(self) -> None:
        self.at: dict[Place, Owner] = {}
        self.asked = 0

    def owner_at(self, *place: Any) -> Owner | None:
        self.asked += 1
        return self.at.get(place)


def owners(*known: Owner) -> tuple[FerryOwners, Found]:
    found: Any = Found()
    made = FerryOwners(found)
    for one in known:
        made.note(one)
    return made, found


def test_the_only_one_has_a_socket_that_is_gone() -> None:
    made, _ = owners(ONE, ONE)
    assert made.of(4, "127.0.0.1", 5000) == ONE


def test_a_socket_of_one_who_is_not_known_is_his() -> None:
    made, found = owners(ONE)
    found.at = {(4, "127.0.0.1", 5000): OTHER}
    assert made.of(4, "127.0.0.1", 5000) == OTHER


def test_of_several_the_one_whose_it_is() -> None:
    made, found = owners(ONE, OTHER)
    found.at = {(4, "127.0.0.1", 5000): OTHER, (6, "::1", 5000): ONE}
    assert (made.of(4, "127.0.0.1", 5000), made.of(6, "::1", 5000)) == (OTHER, ONE)


def test_one_user_with_two_groups_is_two() -> None:
    made, found = owners((1000, 100), (1000, 101))
    found.at = {(4, "127.0.0.1", 5000): (1000, 100)}
    assert made.of(4, "127.0.0.1", 5000) == (1000, 100)


def test_a_socket_that_is_gone_is_nobodys() -> None:
    made, _ = owners(ONE, OTHER)
    assert made.of(4, "127.0.0.1", 5000) == NOBODY


def test_where_none_is_known_they_are_nobodys() -> None:
    made, _ = owners()
    assert made.of(4, "127.0.0.1", 5000) == NOBODY


def test_there_are_so_many_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferry_owners, "_MAX_OWNERS", 2)
    made, _ = owners((1, 1), (2, 2), (1, 1), (3, 3))
    assert list(made._known) == [(1, 1), (3, 3)]


class Asking:
    """A socket to ask with: its connect fails like that, and its tag says that from then on."""

    def __init__(self, error: OSError | None, **answer: int) -> None:
        self.asked: Any
        self._error, self.answer, self.asked = error, layout.Tag(**answer), None

    def fileno(self) -> int:
        return 3

    def connect(self, address: Any) -> None:
        self.asked = address
        if self._error is not None:
            raise self._error


def owner_at(asking: Asking, family: int = 4) -> Owner | None:
    class Tags:
        fd = 4

        def peek(self, key: Any) -> layout.Tag:
            assert key.value == 3
            return asking.answer

    tags: Any = Tags()
    sockets: Any = {4: asking}
    return HostSockets(tags, sockets).owner_at(family, "127.0.0.1", 5000)


REFUSED = PermissionError(13, "x")


def test_the_answer_is_in_the_tag_of_the_socket_that_asks() -> None:
    asking = Asking(REFUSED, owned=layout.OWNED_KNOWN, uid=1000, gid=100)
    assert (owner_at(asking), asking.asked) == (ONE, ("127.0.0.1", 5000))


def test_a_socket_of_which_nobody_said_whose_it_is_is_nobodys() -> None:
    assert owner_at(Asking(REFUSED, owned=layout.OWNED_UNKNOWN)) == NOBODY


def test_there_is_none_where_the_hook_says_so_or_does_not_answer() -> None:
    assert owner_at(Asking(REFUSED, owned=0, uid=1000)) is None
    for error in (None, OSError(97, "x")):
        assert owner_at(Asking(error, owned=layout.OWNED_KNOWN, uid=1000)) is None
    assert owner_at(Asking(REFUSED, owned=layout.OWNED_KNOWN), family=6) is None
