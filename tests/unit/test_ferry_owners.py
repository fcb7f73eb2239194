"""Whose sockets a ferry stands in for."""

from __future__ import annotations

import os
import socket
from contextlib import closing

import pytest

from graft.swap import ferry_owners
from graft.swap.ferry_owners import NOBODY, FerryOwners, HostSocket, host_sockets


def owners(*users: tuple[int, int]) -> FerryOwners:
    made = FerryOwners()
    for uid, gid in users:
        made.note(uid, gid)
    return made


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> list[HostSocket]:
    """Those of the host, to be filled in."""
    found: list[HostSocket] = []
    monkeypatch.setattr(ferry_owners, "host_sockets", lambda: found)
    return found


@pytest.mark.usefixtures("sockets")
def test_the_only_user_has_every_socket() -> None:
    assert owners((1000, 100)).of("127.0.0.1", 5000) == (1000, 100)


def test_of_several_the_one_who_has_the_address_or_all_of_them(sockets: list[HostSocket]) -> None:
    both = owners((1000, 100), (1001, 101))
    sockets += [HostSocket("0.0.0.0", 5000, 1000), HostSocket("::", 5001, 1001), HostSocket("10.0.0.1", 5000, 1001)]
    assert both.of("127.0.0.1", 5000) == (1000, 100)
    assert both.of("127.0.0.1", 5001) == (1001, 101)
    assert both.of("10.0.0.1", 5000) == (1001, 101)


def test_a_user_for_whom_no_socket_was_made_is_not_the_containers(sockets: list[HostSocket]) -> None:
    sockets += [HostSocket("0.0.0.0", 5000, 1000), HostSocket("127.0.0.1", 5000, 0)]
    assert owners((1000, 100), (1001, 101)).of("127.0.0.1", 5000) == (1000, 100)


def test_a_socket_that_is_gone_or_could_be_of_several_is_nobodys(sockets: list[HostSocket]) -> None:
    both = owners((0, 0), (1001, 101))
    assert both.of("127.0.0.1", 5000) == NOBODY
    sockets += [HostSocket("0.0.0.0", 5000, 0), HostSocket("::", 5000, 1001)]
    assert both.of("127.0.0.1", 5000) == NOBODY


@pytest.mark.usefixtures("sockets")
def test_without_a_user_they_are_nobodys() -> None:
    assert owners().of("127.0.0.1", 5000) == NOBODY


def test_the_last_group_of_a_user_counts_and_there_are_so_many_users_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferry_owners, "_MAX_USERS", 2)
    made = owners((1, 1), (2, 2), (1, 10), (3, 3))
    assert made._groups == {1: 10, 3: 3}


@pytest.mark.parametrize(
    ("family", "address", "shown"),
    [(socket.AF_INET, "127.1.2.3", "127.1.2.3"), (socket.AF_INET6, "::1", "::1"), (socket.AF_INET6, "::", "::")],
)
def test_the_kernels_list(family: int, address: str, shown: str) -> None:
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as sock:
        sock.bind((address, 0))
        port = sock.getsockname()[1]
        assert HostSocket(shown, port, os.getuid()) in list(host_sockets())
