"""The relay of datagrams: its addresses, its tables, and what ages, with maps and namespaces that are the test's."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.datapath import layout
from graft.splice import datagrams
from graft.splice.datagrams import DatagramRelay, ExchangeId, Server, datagram_socket
from graft.splice.event_loop import EventLoop
from graft.splice.publication import DialTarget
from graft.splice.resources import DaemonResources

T = TypeVar("T")
CONTAINER = 7


class Table:
    """A map, by the bytes of its keys."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Any] = {}

    def put(self, key: Any, value: Any) -> None:
        self.entries[bytes(key)] = value

    def delete(self, key: Any) -> None:
        self.entries.pop(bytes(key), None)

    def keys(self) -> Iterator[layout.ExchangeSlot]:
        return iter([layout.ExchangeSlot.from_buffer_copy(key) for key in self.entries])


class Here:
    """This namespace, as one of a container."""

    @staticmethod
    def run(call: Callable[[], T]) -> T:
        return call()


class Setting:
    """A relay, a server of the container, and the relay's socket for it."""

    def __init__(self) -> None:
        self.loop = EventLoop(lambda: None)
        self.resources = DaemonResources(self.loop, 10000).add_container(CONTAINER)
        self.maps = SimpleNamespace(
            exchanges=Table(),
            exchange_clients=Table(),
            crossings=Table(),
            ingress=None,
            egress=None,
            egress_ports=None,
        )
        self.relay = DatagramRelay(self.resources, self.maps, Here(), Here())  # type: ignore[arg-type]
        self.program = datagram_socket()
        self.program.bind(("127.0.0.1", 0))
        self.program.settimeout(5)
        outside = datagram_socket()
        outside.bind(("127.0.0.1", 0))
        self.address = outside.getsockname()
        target = DialTarget(socket.AF_INET, *self.program.getsockname())
        self.server = Server(self.relay, outside, target, "")

    def hear(self) -> tuple[bytes, Any]:
        """What the program receives next, and from whom."""
        self.loop.turn()
        return self.program.recvfrom(100)


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.server.close()
    made.relay.stop()
    made.program.close()
    made.loop.shut_down()


@given(st.booleans(), st.integers(1, layout.EXCHANGE_GENERATIONS), st.integers(0, layout.EXCHANGE_SLOTS - 1))
def test_an_address_says_which_exchange_it_is(out: bool, generation: int, slot: int) -> None:
    number = ExchangeId(out, generation, slot)
    assert ExchangeId.parse(number.packed) == number
    assert socket.inet_ntoa(number.packed) not in ("127.0.0.1", "127.255.255.255")


def test_an_address_elsewhere_is_no_exchange() -> None:
    assert ExchangeId.parse(socket.inet_aton("10.0.0.1")) is None


def test_an_answer_finds_its_client_and_nobody_elses_does(setting: Setting) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, datagram_socket() as neighbour:
        client.settimeout(5)
        client.sendto(b"question", setting.address)
        data, peer = setting.hear()
        assert data == b"question" and peer[1] == setting.relay.port
        neighbour.sendto(b"forged", peer)
        setting.program.sendto(b"answer", peer)
        setting.loop.turn()
        assert client.recvfrom(100) == (b"answer", setting.address)
        number = ExchangeId.parse(socket.inet_aton(peer[0]))
        assert number is not None
        stale = number._replace(generation=number.generation % layout.EXCHANGE_GENERATIONS + 1)
        setting.program.sendto(b"stale", (socket.inet_ntoa(stale.packed), setting.relay.port))
        setting.loop.turn()
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(100)


def test_unanswered_clients_give_way_to_new_ones(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "MAX_CLIENTS", 4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"question", setting.address)
        setting.program.sendto(b"answer", setting.hear()[1])
        setting.loop.turn()
        for _ in range(20):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.sendto(b"noise", setting.address)
                setting.hear()
        assert setting.relay.describe() == {"clients": 5, "destinations": 0}
        assert len(setting.maps.exchanges.entries) == len(setting.maps.exchange_clients.entries) == 5
        assert client.getsockname()[1] in {port for _, port in setting.server.clients}


def test_clients_age(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        one.sendto(b"question", setting.address)
        setting.program.sendto(b"answer", setting.hear()[1])
        two.sendto(b"noise", setting.address)
        setting.loop.turn()
        setting.loop.turn()
    for seconds, left in ((0.0, 2), (datagrams.UNANSWERED_SECONDS + 5, 1), (datagrams.ANSWERED_SECONDS + 5, 0)):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        setting.relay._age()
        monkeypatch.undo()
        assert setting.relay.describe()["clients"] == left == len(setting.maps.exchanges.entries)
