"""Listeners: connections are accepted in turns, and only while their container may have more."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from graft.splice.acceptor import Acceptor, ConnectFar, PeerAddress
from graft.splice.connection import RESET_ON_CLOSE
from graft.splice.event_loop import EventLoop
from graft.splice.resources import ContainerResources, DaemonResources
from graft.splice.slow_calls import Blamed

DESCRIPTORS = 128  # half of them reserved, and no pipes: at the most 32 connections in all


class Place:
    """A container's listener on loopback, and a far end that takes every connection."""

    def __init__(self, loop: EventLoop, resources: ContainerResources) -> None:
        self.loop, self.resources = loop, resources
        self.far = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.front = front = socket.create_server(("127.0.0.1", 0), backlog=200)
        front.setblocking(False)
        self.address = front.getsockname()
        self.connect_far: ConnectFar = self.connect_back
        self.acceptor = Acceptor(resources, front, lambda near, peer: self.connect_far(near, peer), None)
        self.clients: list[socket.socket] = []

    def connect_back(self, _near: socket.socket, _peer: PeerAddress) -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        made.connect_ex(self.far.getsockname())
        return made

    def connect_clients(self, count: int) -> None:
        """Clients connect; they wait in the backlog until they are accepted."""
        for _ in range(count):
            client = socket.create_connection(self.address, timeout=10)
            client.setblocking(False)
            self.clients.append(client)

    def disconnect(self, count: int = 1) -> None:
        for _ in range(count):
            client = self.clients.pop(0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            client.close()

    @property
    def relayed(self) -> int:
        return len(self.acceptor.connections)

    def close(self) -> None:
        self.acceptor.close()
        self.turn()
        for connection in list(self.resources.connections):
            connection.reset()
        for client in self.clients:
            client.close()
        self.far.close()

    def turn(self, times: int = 20) -> None:
        for _ in range(times):
            self.loop.tick_soon()
            self.loop.turn()


class Two:
    """A container that takes all it can, and another one."""

    def __init__(self, descriptors: int = DESCRIPTORS) -> None:
        self.loop = EventLoop(lambda: None, interval=0.001)
        self.daemon_resources = DaemonResources(self.loop, descriptors, 0)
        self.first = Place(self.loop, self.daemon_resources.add_container(1))
        self.places = [self.first]

    def second(self) -> Place:
        self.places.append(Place(self.loop, self.daemon_resources.add_container(2)))
        return self.places[-1]

    def turn(self) -> None:
        self.first.turn()

    def close(self) -> None:
        for place in self.places:
            place.close()
        self.daemon_resources.close()
        self.loop.shut_down()


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    with contextlib.closing(made):
        yield made


def test_the_second_container_can_connect_whatever_the_first_has(two: Two) -> None:
    second = two.second()
    two.first.connect_clients(50)
    two.turn()
    assert 0 < two.first.relayed < 32
    second.connect_clients(2)
    two.turn()
    assert second.relayed == 2


def test_a_waiting_client_is_accepted_when_another_of_its_container_disconnects(two: Two) -> None:
    two.first.connect_clients(50)
    two.turn()
    before = two.first.acceptor.served
    two.first.disconnect(3)
    two.turn()
    assert two.first.acceptor.served == before + 3


def test_a_waiting_client_is_accepted_when_another_container_is_removed(two: Two) -> None:
    second = two.second()
    two.first.connect_clients(50)
    two.turn()
    before = two.first.relayed
    two.places.remove(second)
    second.close()
    second.resources.close()
    two.turn()
    assert two.first.relayed > before


def test_lent_descriptors_are_reclaimed_for_a_container_that_is_added_later() -> None:
    two = Two()
    with contextlib.closing(two):
        two.first.connect_clients(50)
        two.turn()
        # One after the other takes all that it may, until nothing is free.
        number = 2
        while two.daemon_resources.descriptors.free >= 2 + 4:
            number += 1
            two.places.append(Place(two.loop, two.daemon_resources.add_container(number)))
            two.places[-1].connect_clients(20)
            two.turn()
        connections = list(two.first.resources.connections)
        last = two.second()
        last.connect_clients(1)
        two.turn()
        assert last.relayed == 1
        left = list(two.first.resources.connections)
        assert left == connections[: len(left)] and len(left) < len(connections), "the newest were reset, no others"


def test_a_storm_of_connections_is_accepted_in_turns() -> None:
    two = Two(4096)
    with contextlib.closing(two):
        two.loop.turn_is_over = lambda: False  # type: ignore[method-assign]
        two.first.connect_clients(100)
        most = 0
        while two.first.relayed < 100:
            before = two.first.relayed
            two.first.acceptor.accept()
            most = max(most, two.first.relayed - before)
        assert most == 8


def test_what_is_refused_is_closed_in_the_containers_turns(two: Two) -> None:
    two.first.connect_far = lambda _near, _peer: None
    two.first.connect_clients(1)
    two.loop._turns.hold(1, 1e12)
    two.first.acceptor.accept()
    two.turn()
    with pytest.raises(BlockingIOError):
        two.first.clients[0].recv(1)
    two.loop._turns.release(2e12)
    two.turn()
    assert two.first.clients[0].recv(1) == b""


def test_the_container_waits_for_what_it_refuses_again_and_again_of_a_peer_that_is_slow(two: Two) -> None:
    two.first.connect_far = lambda _near, _peer: None
    said: list[Blamed | None] = []

    def close(sock: socket.socket, blamed: Blamed | None = None, ends: bool = False) -> None:
        sock.close()
        said.append(blamed)

    two.first.resources.close_socket = close  # type: ignore[method-assign]
    for _ in range(2):
        two.first.connect_clients(1)
        two.first.acceptor.accept()
        if said[0] is not None:
            said[0](0.003)
    assert said[0] is not None and said[1:] == [None]


def test_a_turn_is_over_after_a_connect_that_took_long() -> None:
    two = Two(4096)
    with contextlib.closing(two):
        connect = two.first.connect_far

        def slow(near: socket.socket, peer: PeerAddress) -> socket.socket | None:
            time.sleep(0.001)
            return connect(near, peer)

        two.first.connect_far = slow
        two.first.connect_clients(10)
        calls: list[int] = []
        while two.first.relayed < 10:
            before = two.first.relayed
            two.loop.turn()
            calls.append(two.first.relayed - before)
        assert max(calls) <= 2  # one for the event, one in its turn


def test_a_listener_that_somebody_else_closed_is_lost(two: Two) -> None:
    two.first.front.shutdown(socket.SHUT_RDWR)
    two.turn()
    assert two.first.acceptor.lost
    assert two.first.resources.descriptors.taken == 0


def test_a_closed_listener_still_serves_its_backlog() -> None:
    two = Two(4096)
    with contextlib.closing(two):
        two.first.connect_clients(20)
        two.first.acceptor.close()
        two.turn()
        assert two.first.acceptor.served == 20
        with pytest.raises(ConnectionRefusedError):
            two.first.connect_clients(1)


def test_a_connection_without_a_far_end_is_reset_and_costs_nothing(two: Two) -> None:
    def fail(_near: socket.socket, _peer: PeerAddress) -> socket.socket:
        raise OSError("no far end")

    two.first.connect_far = fail
    two.first.connect_clients(40)
    two.turn()
    assert two.first.resources.descriptors.taken == 0
    assert two.first.acceptor.served == 0
