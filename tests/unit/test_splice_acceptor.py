"""Listeners: connections are accepted in turns, and only while their container may have more."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from graft.splice.acceptor import Acceptor, Peer
from graft.splice.connection import RESET_ON_CLOSE
from graft.splice.event_loop import EventLoop
from graft.splice.resources import Account, Resources

DESCRIPTORS = 128  # half of them reserved, and no pipes: at the most 32 connections in all


class Place:
    """A container's listener on loopback, and a far end that takes what comes."""

    def __init__(self, loop: EventLoop, account: Account) -> None:
        self.loop, self.account = loop, account
        self.far = socket.create_server(("127.0.0.1", 0), backlog=200)
        front = socket.create_server(("127.0.0.1", 0), backlog=200)
        front.setblocking(False)
        self.address = front.getsockname()
        self.acceptor = Acceptor(account, front, self._reach, None)
        self.clients: list[socket.socket] = []

    def _reach(self, _near: socket.socket, _peer: Peer) -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        made.connect_ex(self.far.getsockname())
        return made

    def knock(self, count: int) -> None:
        """Clients connect; the kernel takes them before anybody accepts."""
        for _ in range(count):
            client = socket.create_connection(self.address, timeout=10)
            client.setblocking(False)
            self.clients.append(client)

    def leave(self, count: int = 1) -> None:
        for _ in range(count):
            client = self.clients.pop(0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            client.close()

    @property
    def carried(self) -> int:
        return len(self.acceptor.connections)

    def close(self) -> None:
        self.acceptor.close()
        self.turn()
        for connection in list(self.account.connections):
            connection.reset()
        for client in self.clients:
            client.close()
        self.far.close()

    def turn(self, times: int = 20) -> None:
        for _ in range(times):
            self.loop.look_soon()
            self.loop.turn()


class Two:
    """The one that takes all it can, and the other one."""

    def __init__(self, descriptors: int = DESCRIPTORS) -> None:
        self.loop = EventLoop(lambda: None, interval=0.001)
        self.room = Resources(self.loop, descriptors, 0)
        self.first = Place(self.loop, self.room.account(1))
        self.places = [self.first]

    def second(self) -> Place:
        self.places.append(Place(self.loop, self.room.account(2)))
        return self.places[-1]

    def turn(self) -> None:
        self.first.turn()

    def close(self) -> None:
        for place in self.places:
            place.close()
        self.room.close()
        self.loop.shut_down()


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    with contextlib.closing(made):
        yield made


def test_of_two_that_are_there_the_second_can_connect_whatever_the_first_has(two: Two) -> None:
    second = two.second()
    two.first.knock(50)
    two.turn()
    assert 0 < two.first.carried < 32
    second.knock(2)
    two.turn()
    assert second.carried == 2


def test_who_waits_is_let_in_when_another_of_the_same_container_ends(two: Two) -> None:
    two.first.knock(50)
    two.turn()
    before = two.first.acceptor.served
    two.first.leave(3)
    two.turn()
    assert two.first.acceptor.served == before + 3


def test_who_waits_is_let_in_when_another_container_goes(two: Two) -> None:
    second = two.second()
    two.first.knock(50)
    two.turn()
    before = two.first.carried
    two.places.remove(second)
    second.close()
    second.account.close()
    two.turn()
    assert two.first.carried > before


def test_what_was_lent_before_a_container_came_is_given_back_to_it() -> None:
    two = Two()
    with contextlib.closing(two):
        two.first.knock(50)
        two.turn()
        # One after the other takes all that it may, until nothing is free.
        number = 2
        while two.room.descriptors.free >= 2 + 4:
            number += 1
            two.places.append(Place(two.loop, two.room.account(number)))
            two.places[-1].knock(20)
            two.turn()
        connections = list(two.first.account.connections)
        last = two.second()
        last.knock(1)
        two.turn()
        assert last.carried == 1
        left = list(two.first.account.connections)
        assert left == connections[: len(left)] and len(left) < len(connections), "the newest were reset, no others"


def test_a_storm_of_connections_is_accepted_in_turns() -> None:
    two = Two(4096)
    with contextlib.closing(two):
        two.first.knock(100)
        most = 0
        while two.first.carried < 100:
            before = two.first.carried
            two.first.acceptor.accept()
            most = max(most, two.first.carried - before)
        assert most == 8


def test_a_door_that_closes_still_serves_who_waited() -> None:
    two = Two(4096)
    with contextlib.closing(two):
        two.first.knock(20)
        two.first.acceptor.close()
        two.turn()
        assert two.first.acceptor.served == 20
        with pytest.raises(ConnectionRefusedError):
            two.first.knock(1)


def test_what_cannot_be_joined_is_reset_and_costs_nothing(two: Two) -> None:
    def fail(_near: socket.socket, _peer: Peer) -> socket.socket:
        raise OSError("nobody there")

    two.first.acceptor._reach = fail
    two.first.knock(40)
    two.turn()
    assert two.first.account.descriptors.taken == 0
    assert two.first.acceptor.served == 0
