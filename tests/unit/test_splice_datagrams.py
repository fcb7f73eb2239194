"""The relay of datagrams: its addresses, its tables, and what ages, with maps and namespaces that are the test's."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.datapath import layout
from graft.splice import datagram_clients, datagram_places, resources, stand_in_sockets, stand_ins
from graft.splice.datagram_clients import Clients
from graft.splice.datagram_sockets import Datagram, datagram_socket
from graft.splice.datagrams import DatagramRelay, ExchangeId, Slots
from graft.splice.event_loop import EventLoop
from graft.splice.publication import Peers, Publication, ResolvedEndpoint
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

    def get(self, key: Any) -> Any:
        return self.entries.get(bytes(key))

    peek = get

    def keys(self) -> Iterator[Any]:
        """Of a daemon that was killed: none."""
        return iter(())


class Here:
    """This namespace, as one of a container."""

    cookie = 1

    @staticmethod
    def run(call: Callable[[], T]) -> T:
        return call()


Socket = socket.socket  # the class below has a method of that name


class Setting:
    """A relay, a server of the container, and the relay's socket for it."""

    def __init__(self, six: bool, descriptors: int = 10000) -> None:
        self.six = six
        self.host = "::1" if six else "127.0.0.1"
        self.loop = EventLoop(lambda: None)
        self.loop._call_started = time.monotonic() + 100  # a turn, though no event has begun one
        self.resources = DaemonResources(self.loop, descriptors).add_container(CONTAINER)
        self.maps = SimpleNamespace(
            exchanges=Table(),
            exchange_clients=Table(),
            stand_ins=Table(),
            stand_in_ports=Table(),
            offers=Table(),
            crossings=Table(),
            ingress=None,
            egress=None,
            egress_ports=None,
            broadcasts=None,
            endpoints=None,
        )
        self.relay = DatagramRelay(self.resources, self.maps, Here(), Here())  # type: ignore[arg-type]
        self.program = self.socket()
        self.program.bind((self.host, 0))
        outside = datagram_socket(self.family)
        outside.bind((self.host, 0))
        self.address = outside.getsockname()
        packed = socket.inet_pton(self.family, self.host).ljust(16, b"\0")
        family, port = 6 if six else 4, self.program.getsockname()[1]
        endpoint = ResolvedEndpoint(1, family, packed, self.address[1], 1)
        wanted = Publication(endpoint, family, packed, port, six, protocol=socket.IPPROTO_UDP)
        self.server = self.relay.serve(wanted, outside, "")

    @property
    def family(self) -> int:
        return socket.AF_INET6 if self.six else socket.AF_INET

    def socket(self) -> socket.socket:
        """A new one, of the container or of a client."""
        made = socket.socket(self.family, socket.SOCK_DGRAM)
        made.settimeout(5)
        return made

    @property
    def path(self) -> stand_ins.StandIns | Slots:
        """What relays this family."""
        return self.relay._stand_ins if self.six else self.relay._slots

    @property
    def clients(self) -> Clients:
        return self.path.clients

    @property
    def noted(self) -> tuple[int, int]:
        """How many entries there are in both directions."""
        maps = self.maps
        tables = (maps.stand_ins, maps.stand_in_ports) if self.six else (maps.exchanges, maps.exchange_clients)
        return len(tables[0].entries), len(tables[1].entries)

    def finish_aging(self) -> None:
        """All that is done every few seconds."""
        deque(self.relay._age_each(), 0)

    def stop_relay(self) -> None:
        """At once."""
        deque(self.relay.stop(), 0)

    def hear(self) -> tuple[bytes, Any]:
        """What the program receives next, and from whom."""
        return self.heard_by(self.program)

    def heard_by(self, receiver: Socket) -> tuple[bytes, Any]:
        """What a socket receives next, and from whom. (A turn may be over before all datagrams are relayed.)"""
        deadline = time.monotonic() + 5
        self.loop.turn()
        while not select.select([receiver], [], [], 0)[0] and time.monotonic() < deadline:
            self.loop.turn()
        return receiver.recvfrom(100)


def keep(
    setting: Setting, ports: Collection[int], peers: Collection[int], since: float, unread: Collection[int] = ()
) -> None:
    """The relay learns what sockets there are."""
    deque(setting.relay.keep_programs(ports, Peers(set(peers), set(peers)), set(unread), since), 0)


@pytest.fixture(params=[False, True], ids=["ipv4", "ipv6"])
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    made = Setting(request.param)
    yield made
    made.server.close()
    made.stop_relay()
    made.program.close()
    made.loop.shut_down()


@pytest.fixture
def six() -> Iterator[Setting]:
    made = Setting(True)
    yield made
    made.server.close()
    made.stop_relay()
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
    with setting.socket() as client, setting.socket() as neighbour:
        client.sendto(b"question", setting.address)
        data, peer = setting.hear()
        assert data == b"question"
        neighbour.sendto(b"forged", peer)
        setting.program.sendto(b"answer", peer)
        assert setting.heard_by(client) == (b"answer", setting.address)
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(100)


def test_a_slot_of_another_generation_is_not_the_clients() -> None:
    setting = Setting(False)
    with setting.socket() as client:
        client.sendto(b"question", setting.address)
        _, peer = setting.hear()
        assert peer[1] == setting.relay.port
        number = ExchangeId.parse(socket.inet_aton(peer[0]))
        assert number is not None
        stale = number._replace(generation=number.generation % layout.EXCHANGE_GENERATIONS + 1)
        setting.program.sendto(b"stale", (socket.inet_ntoa(stale.packed), setting.relay.port))
        setting.loop.turn()
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(100)
    setting.server.close()
    setting.stop_relay()
    setting.program.close()
    setting.loop.shut_down()


def test_unanswered_clients_give_way_to_new_ones(setting: Setting) -> None:
    setting.clients.limit = 4
    with setting.socket() as client:
        client.sendto(b"question", setting.address)
        setting.program.sendto(b"answer", setting.hear()[1])
        setting.loop.turn()
        for _ in range(40):
            with setting.socket() as other:
                other.sendto(b"noise", setting.address)
                setting.hear()
        assert setting.relay.describe() == {"clients": 5, "destinations": 0}
        assert setting.noted[1] == 5
        keep(setting, {setting.relay.port}, (), time.monotonic() + 1)
        assert setting.noted == (5, 5)
        assert client.getsockname()[1] in {address[1] for address in setting.server.clients}


def test_clients_age(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with setting.socket() as one, setting.socket() as two:
        one.sendto(b"question", setting.address)
        setting.program.sendto(b"answer", setting.hear()[1])
        two.sendto(b"noise", setting.address)
        setting.loop.turn()
        setting.loop.turn()
    unanswered, answered = datagram_clients.UNANSWERED_SECONDS, datagram_clients.ANSWERED_SECONDS
    for seconds, left in ((0.0, 2), (unanswered + 5, 1), (answered + 5, 0)):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        setting.finish_aging()
        monkeypatch.undo()
        assert setting.relay.describe()["clients"] == left == setting.noted[1]


def test_a_client_that_a_socket_is_connected_to_keeps_its_place(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    client, peer = begun(setting)
    client.close()
    place = peer[1] if setting.six else int.from_bytes(socket.inet_aton(peer[0]), "big")
    forgotten = setting.relay._stand_ins._sockets._forgotten if setting.six else setting.relay._slots._forgotten
    keep(setting, {setting.relay.port}, [place], now)
    monkeypatch.setattr(time, "monotonic", lambda: now + 10 * datagram_clients.ANSWERED_SECONDS)
    setting.finish_aging()
    monkeypatch.undo()
    assert len(setting.clients) == 1
    setting.path.remove_client(next(iter(setting.clients)))
    anothers = place ^ (1 if setting.six else 1 << layout.EXCHANGE_SLOT_BITS)  # at the same slot, of another generation
    for peers, left in (([place], 1), ([anothers], 0)):
        keep(setting, {setting.relay.port}, peers, time.monotonic() + 1)
        assert len(forgotten) == left


# ---- stand-ins


def begun(setting: Setting) -> tuple[socket.socket, Any]:
    """A client that the program has heard, and who that is to the program."""
    client = setting.socket()
    client.sendto(b"question", setting.address)
    return client, setting.hear()[1]


def test_what_was_sent_to_a_forgotten_client_does_not_reach_the_next_one(six: Setting) -> None:
    """Nor does what he sent, and the program has not read yet, seem to come from that one."""
    first, peer = begun(six)
    with first, six.socket() as other:
        six.program.sendto(b"for the first", peer)  # not read yet
        six.path.remove_client(next(iter(six.clients)))
        other.bind((six.host, 0))
        added = six.path.add_client(
            six.server, Datagram(b"", other.getsockname(), socket.inet_pton(socket.AF_INET6, six.host))
        )
        assert added.number != peer[1]
        six.loop.turn()
        other.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.recv(100)


def noted_of(setting: Setting, port: int) -> layout.StandInValue:
    found = setting.maps.stand_ins.get(layout.StandInKey(container=CONTAINER, port=port))
    assert isinstance(found, layout.StandInValue)
    return found


def test_stand_ins_are_as_many_as_the_containers_part_allows() -> None:
    setting = Setting(True, 200)
    part = setting.resources.daemon.descriptors.part
    with ExitStack() as stack:
        for _ in range(2 * part):
            other = stack.enter_context(setting.socket())
            other.sendto(b"noise", setting.address)
            assert setting.hear()[0] == b"noise"
    assert setting.resources.descriptors.taken <= part
    setting.server.close()
    setting.stop_relay()
    assert not setting.resources.descriptors.taken
    setting.program.close()
    setting.loop.shut_down()


def test_the_same_link_local_address_on_another_link_is_not_the_same_client(six: Setting) -> None:
    reached = socket.inet_pton(socket.AF_INET6, "fe80::2")
    first = six.path.add_client(six.server, Datagram(b"", ("fe80::1%one", 5000, 0, 1), reached))
    with pytest.raises(OSError):
        six.path.add_client(six.server, Datagram(b"", ("fe80::1%two", 5000, 0, 2), reached))
    six.path.add_client(six.server, Datagram(b"", ("fe80::1%two", 5001, 0, 2), reached))
    six.path.remove_client(first)
    six.path.add_client(six.server, Datagram(b"", ("fe80::1%two", 5000, 0, 2), reached))


def offered(setting: Setting) -> set[int]:
    (offer,) = setting.maps.offers.entries.values()
    return set(offer.ports[: offer.count])


def test_a_port_is_used_again_when_the_queue_of_its_server_is_empty(
    six: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would pick one of so many again soon."""
    sockets, picked = six.relay._stand_ins._sockets, [0]

    def bound(new: Callable[[], socket.socket], address: str, _late: object) -> socket.socket:
        sock = new()
        sock.bind((address, picked.pop(0)))
        return sock

    monkeypatch.setattr(stand_in_sockets, "bound_by_number", bound)
    first = sockets.make()
    sockets.forget(first, bytes(16), 53, 5300)
    picked += [first.port, 0]
    again = sockets.make()
    assert again.port != first.port and not picked
    sockets.close(again)
    listed, later = {six.relay.port}, time.monotonic() + 1
    for unread, since in (([5300], later), ([], time.monotonic())):  # it is not; it was not listed since
        keep(six, listed, (), since, unread)
        assert noted_of(six, first.port).port == 53
    keep(six, listed, (), later, [5301])
    picked.append(first.port)
    assert six.noted[0] == 0
    sockets.close(sockets.make())
    assert not picked


def test_a_namespace_without_ports_is_not_asked_again_and_again(six: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no client is forgotten for it."""
    known = begun(six)[0]
    asked = []

    def bound(*_: object) -> socket.socket:
        asked.append(1)
        raise OSError(errno.EADDRINUSE, "")

    monkeypatch.setattr(stand_in_sockets, "bound_by_number", bound)
    with ExitStack() as stack:
        stack.enter_context(known)
        for _ in range(10):
            stack.enter_context(six.socket()).sendto(b"noise", six.address)
            six.loop.turn()
    assert len(asked) == 1 and len(six.clients) == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    with six.socket() as other:
        other.sendto(b"noise", six.address)
        six.loop.turn()
    assert len(asked) == 2


def test_no_more_ports_wait_than_there_may_be(six: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel lists UDP sockets; elsewhere the one that waits longest is free."""
    monkeypatch.setattr(stand_in_sockets, "MAX_FORGOTTEN", 3)
    sockets = six.relay._stand_ins._sockets
    for _ in range(5):
        sockets.forget(sockets.make(), bytes(16), 53, 5300)
    assert six.noted[0] == 3
    keep(six, {six.relay.port}, (), time.monotonic() + 1, [5300])
    with pytest.raises(OSError):
        sockets.make()


def test_a_slot_is_used_again_when_the_queue_of_its_server_is_empty(four: Setting) -> None:
    slots = four.relay._slots
    with four.socket() as client:
        client.sendto(b"question", four.address)
        four.hear()
        (forgotten,) = four.clients
        slots.remove_client(forgotten)
    while slots._free_slots:
        slots._free_slots.popleft()
    (left,) = four.maps.exchanges.entries.values()
    assert (left.port, left.local_port) == (forgotten.address[1], 0)
    port, again = four.program.getsockname()[1], Datagram(b"", ("127.0.0.1", 9), bytes(4))
    for unread, since in (([port], time.monotonic() + 1), ([], time.monotonic())):
        keep(four, {four.relay.port}, (), since, unread)
        with pytest.raises(OSError):
            slots.add_client(four.server, again)
    keep(four, {four.relay.port}, (), time.monotonic() + 1)
    assert four.noted == (0, 0)
    assert slots.add_client(four.server, again).number == forgotten.number


def test_a_port_stands_for_one_destination_only(six: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    port = taken(six, 0, local_port=5001)
    keep(six, {six.relay.port, 5001}, (), 0.0)
    assert port in offered(six)
    keep(six, {six.relay.port}, (), time.monotonic())
    assert port not in offered(six) and 0 not in offered(six) and len(offered(six)) == stand_ins.FIRST_OFFERED
    with monkeypatch.context() as patched:
        patched.setattr(six.relay._stand_ins._sockets, "make", no_room)
        taken(six, 1, local_port=5001)
        keep(six, {six.relay.port}, (), time.monotonic())
        assert 0 in offered(six) and len(offered(six)) == stand_ins.FIRST_OFFERED
    six.finish_aging()
    assert 0 not in offered(six)


def no_room() -> None:
    raise OSError


def test_the_newest_destination_does_not_give_way(six: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_OFFERED", stand_ins.FIRST_OFFERED)
    path = six.relay._stand_ins
    monkeypatch.setattr(six.relay._destinations, "open", lambda *_: None)
    connected = {taken(six, at, connected=True) for at in range(stand_ins.FIRST_OFFERED - 1)}
    keep(six, {six.relay.port, 5000}, connected, 0.0)
    newest = taken(six, stand_ins.FIRST_OFFERED - 1, local_port=six.program.getsockname()[1])
    six.program.sendto(b"question", ("::1", newest))
    six.loop.turn()
    assert newest in path._taken and newest in offered(six)


def taken(setting: Setting, at: int, connected: bool = False, local_port: int = 5000) -> int:
    """A hook takes one of those that are offered; its port."""
    (offer,) = setting.maps.offers.entries.values()
    key = layout.StandInKey(container=CONTAINER, port=offer.ports[at])
    value = layout.StandInValue(port=53, cookie=at + 1, begun=time.monotonic_ns(), local_port=local_port)
    value.connected = time.monotonic_ns() if connected else 0
    setting.maps.stand_ins.put(key, value)
    return int(offer.ports[at])


def test_more_stand_ins_are_offered_when_most_are_taken(six: Setting) -> None:
    for at in range(stand_ins.FIRST_OFFERED):
        taken(six, at)
    keep(six, {six.relay.port, 5000}, (), 0.0)
    (offer,) = six.maps.offers.entries.values()
    assert offer.count == 2 * stand_ins.FIRST_OFFERED and all(offer.ports[: offer.count])


def test_then_those_that_no_socket_is_connected_to_are_free_again(
    six: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_OFFERED", stand_ins.FIRST_OFFERED)
    connected = {taken(six, at, connected=True) for at in range(8)}
    for at in range(8, stand_ins.FIRST_OFFERED):
        taken(six, at)
    keep(six, {six.relay.port, 5000}, connected, 0.0)
    left = {layout.StandInKey.from_buffer_copy(key).port for key in six.maps.stand_ins.entries}
    assert connected < left and len(left) == stand_ins.FIRST_OFFERED * 3 // 4


def test_a_stand_in_is_free_when_its_socket_is_gone_or_idle(six: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    connected, idle = taken(six, 0, connected=True, local_port=0), taken(six, 1)
    listed = {six.relay.port, 5000}
    keep(six, listed, {connected}, time.monotonic())
    assert six.noted[0] == 2
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    six.finish_aging()
    monkeypatch.undo()
    assert noted_of(six, connected) and six.noted[0] == 1 and idle != connected
    keep(six, listed, (), time.monotonic())
    assert six.noted[0] == 0
    taken(six, 2, local_port=5001)
    keep(six, listed, (), time.monotonic())
    assert six.noted[0] == 0


# ---- slots of destinations


def noted_slot(setting: Setting, number: int, generation: int, used: float) -> layout.ExchangeSlot:
    """A hook has noted a destination, and found it last at that time."""
    slot = layout.ExchangeSlot(container=CONTAINER, slot=number, out=1)
    setting.maps.exchanges.put(slot, layout.ExchangeValue(generation=generation, used=int(used * 1e9), family=4))
    return slot


def aged(setting: Setting, slot: layout.ExchangeSlot, peers: set[int], since: float) -> bool:
    """Whether it is the next to be taken when all slots were looked at."""
    ports = {setting.relay.port}
    for _ in setting.relay.keep_programs(ports, Peers(peers, set()), (), since):
        pass
    for _ in range(layout.EXCHANGE_OUT_SLOTS // 32):
        setting.finish_aging()
    return not setting.maps.exchanges.get(slot).used


@pytest.fixture
def four() -> Iterator[Setting]:
    made = Setting(False)
    yield made
    made.server.close()
    made.stop_relay()
    made.program.close()
    made.loop.shut_down()


def test_a_slot_that_was_not_used_for_long_is_taken_next(four: Setting) -> None:
    now = time.monotonic()
    assert not aged(four, noted_slot(four, 5, 9, now - 1), set(), now)
    assert aged(four, noted_slot(four, 5, 9, now - 100), set(), now)


def test_a_slot_to_which_a_socket_is_connected_is_kept(four: Setting) -> None:
    """One may be connected for hours before it sends: no hook sees that, and it cannot begin anew."""
    now = time.monotonic()
    slot, peer = noted_slot(four, 5, 9, now - 100), ExchangeId(True, 9, 5).number
    assert not aged(four, slot, {peer}, now)
    assert aged(four, slot, {ExchangeId(True, 8, 5).number}, now)


def test_a_slot_that_a_socket_was_connected_to_after_the_listing_is_kept(four: Setting) -> None:
    now = time.monotonic()
    assert not aged(four, noted_slot(four, 5, 9, now - 100), set(), now - 101)


def test_a_relay_that_stops_leaves_nothing_in_the_maps() -> None:
    for is_six in (False, True):
        setting = Setting(is_six)
        with setting.socket() as client:
            client.sendto(b"question", setting.address)
            setting.hear()
        if is_six:
            taken(setting, 0)
        else:
            noted_slot(setting, 5, 9, 0.0)
        setting.stop_relay()
        assert setting.noted == (0, 0) and not setting.maps.offers.entries
        setting.server.close()
        setting.program.close()
        setting.loop.shut_down()


def test_a_client_that_went_to_a_newer_server_keeps_that_one(four: Setting) -> None:
    """Those of a server that is closed are forgotten a little later."""
    with four.socket() as client:
        client.sendto(b"question", four.address)
        four.hear()
        (old,) = four.clients
        new = four.path.add_client(four.server, Datagram(b"", old.address, old.reached))
        four.path.remove_client(old)
        ((_, number),) = ((key, value.value) for key, value in four.maps.exchange_clients.entries.items())
        assert number == ExchangeId(False, new.generation, new.number).number
        four.server.clients[new.address] = new


def test_no_datagram_is_relayed_when_the_turn_is_over(four: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are more: one that was slow to deliver is followed by others' turns."""
    with four.socket() as client:
        for _ in range(3):
            client.sendto(b"question", four.address)
        monkeypatch.setattr(four.loop, "turn_is_over", lambda: True)
        four.hear()
        four.program.settimeout(0.1)
        with pytest.raises(TimeoutError):
            four.program.recv(100)
        four.program.settimeout(5)
        four.hear()
        monkeypatch.undo()


def test_what_cannot_be_made_is_not_left_half_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    setting = Setting(False)
    taken_before = len(setting.loop._handlers)
    monkeypatch.setattr(stand_ins.StandIns, "_offer", fail)
    with pytest.raises(RuntimeError):
        DatagramRelay(setting.resources, setting.maps, Here(), Here())  # type: ignore[arg-type]
    assert len(setting.loop._handlers) == taken_before
    monkeypatch.setattr(setting.maps.crossings, "put", fail)
    with pytest.raises(RuntimeError):
        DatagramRelay(setting.resources, setting.maps, Here(), Here())  # type: ignore[arg-type]
    assert len(setting.loop._handlers) == taken_before
    setting.server.close()
    setting.stop_relay()
    setting.program.close()
    setting.loop.shut_down()


def test_a_container_has_no_more_clients_than_its_share_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagram_places, "_LEAST_CLIENTS", 1)
    limit = layout.EXCHANGE_OUT_SLOTS + 16
    monkeypatch.setattr(resources, "ClientPlaces", lambda: datagram_places.ClientPlaces(limit))
    setting = Setting(False)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(setting.socket()).sendto(b"noise", setting.address)
            assert setting.hear()[0] == b"noise"
    assert setting.noted == (12, 12)  # three quarters
    for client in list(setting.clients):
        setting.path.remove_client(client)
    keep(setting, {setting.relay.port}, (), time.monotonic() + 1)
    assert not setting.relay._slots._share.taken
    setting.server.close()
    setting.stop_relay()
    setting.program.close()
    setting.loop.shut_down()
