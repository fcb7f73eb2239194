"""Which listeners are published, and what is dialled for them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.kernel.sockdiag import ListeningSocket, parse_listener
from graft.splice.publication import MAX_UNPUBLISHED, Publication, PublicationPlan, ResolvedEndpoint, target

Lookup = Callable[[int, bytes, int], ResolvedEndpoint | None]

ANY = bytes(16)
LOOPBACK = b"\x7f\0\0\1".ljust(16, b"\0")
OWN = b"\x0a\x58\0\5".ljust(16, b"\0")
MAPPED = bytes(10) + b"\xff\xff" + b"\x0a\x58\0\5"
FIXED = ResolvedEndpoint(1, 4, ANY, 8080, 1)
DYNAMIC = ResolvedEndpoint(2, 4, ANY, 0, 1)
SIX = ResolvedEndpoint(3, 6, ANY, 8080, 1)
DUAL = ResolvedEndpoint(4, 6, ANY, 8080, 1, dual_stack=True)


def listening(family: int, address: bytes, port: int = 80, v6only: bool = False, cgroup: int = 7) -> ListeningSocket:
    return ListeningSocket(family, address, port, v6only, cgroup, 0)


def plan(
    found: Iterable[ListeningSocket], lookup: Lookup, most: int = 100, published: Sequence[Publication] = ()
) -> PublicationPlan:
    made = PublicationPlan({7}, lambda _protocol, *place: lookup(*place), most, published)
    for one in found:
        made.add(one)
    return made


def publications(found: Iterable[ListeningSocket], lookup: Lookup) -> list[Publication]:
    return plan(found, lookup).publications


@pytest.mark.parametrize(
    ("family", "address", "v6only", "dialled", "source"),
    [
        (4, ANY, False, "127.0.0.1", None),
        (4, LOOPBACK, False, "127.0.0.1", None),
        (4, OWN, False, "10.88.0.5", "127.0.0.1"),
        (6, ANY, False, "127.0.0.1", None),
        (6, ANY, True, "::1", None),
        (6, bytes(15) + b"\1", True, "::1", None),
        (6, b"\xfd" + bytes(14) + b"\5", True, "fd00::5", "::1"),
        (6, MAPPED, False, "10.88.0.5", "127.0.0.1"),
    ],
)
def test_a_listener_is_dialled_where_it_listens(
    family: int, address: bytes, v6only: bool, dialled: str, source: str | None
) -> None:
    found = target(family, address, 80, v6only)
    assert (found.address, found.port, found.source) == (dialled, 80, source)
    assert found.family == (socket.AF_INET6 if ":" in dialled else socket.AF_INET)


@pytest.mark.parametrize(
    ("endpoint", "address", "v6only", "dialled", "takes_no_ipv4"),
    [
        (FIXED, ANY, False, None, False),
        (SIX, ANY, False, "::1", True),
        (DUAL, ANY, False, "::1", False),
        (DUAL, ANY, True, "::1", True),
        (DUAL, bytes(15) + b"\1", False, "::1", True),
        (DUAL, b"\xfd" + bytes(14) + b"\5", False, "fd00::5", True),
    ],
)
def test_datagrams_of_ipv6_clients_go_to_an_address_of_ipv6(
    endpoint: ResolvedEndpoint, address: bytes, v6only: bool, dialled: str | None, takes_no_ipv4: bool
) -> None:
    found = Publication(endpoint, 6, address, 53, v6only, protocol=socket.IPPROTO_UDP)
    assert (found.target6.address if found.target6 else None) == dialled
    assert found.takes_no_ipv4 is takes_no_ipv4


def test_a_port_that_only_somebody_else_is_connected_to_has_no_peer() -> None:
    plan = PublicationPlan({7}, lambda *_: None, 10, (), {8})
    for cgroup, port in ((0, 1000), (7, 1007), (8, 1008), (9, 1009)):
        plan.add_datagram_socket(connected(6, bytes(15) + b"\1", port, cgroup))
    assert plan.datagram_peers == (set(), {1000, 1007, 1009})  # whose 9 is, is not known yet
    assert plan.elsewhere == {8, 9}


def test_addresses_of_the_loopback_network_that_somebody_is_connected_to_are_peers() -> None:
    """Not others, of whom that is known: they could keep all slots from being used again."""
    plan = PublicationPlan({7}, lambda *_: None, 10, (), {8})
    for family, text, cgroup in (
        (4, "127.128.0.1", 7),
        (6, "::ffff:127.128.0.2", 9),
        (4, "192.0.2.1", 7),
        (4, "127.128.0.3", 8),
    ):
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        plan.add_datagram_socket(connected(family, socket.inet_pton(kind, text).ljust(16, b"\0"), 1000, cgroup))
    assert plan.datagram_peers == ({0x7F800001, 0x7F800002}, set())


def connected(family: int, peer: bytes, port: int, cgroup: int) -> ListeningSocket:
    """A UDP socket with a peer."""
    return ListeningSocket(
        family, ANY, 5000, True, cgroup, 0, protocol=socket.IPPROTO_UDP, connected=True, peer_port=port, peer=peer
    )


def test_the_ports_are_known_at_which_something_is_to_be_read() -> None:
    """Not by others, of whom that is known: they could keep it so."""
    plan = PublicationPlan({7}, lambda *_: None, 10, (), {8})
    for port, cgroup, unread in ((5000, 7, 768), (5001, 7, 0), (5002, 8, 768), (5003, 9, 768), (5004, 0, 768)):
        plan.add_datagram_socket(replace(listening(4, ANY, port, cgroup=cgroup), unread=unread))
    plan.add_datagram_socket(replace(connected(4, LOOPBACK, 53, 7), port=5005, unread=768))
    assert plan.unread_ports == {5000, 5003, 5004, 5005}


def test_a_stand_ins_port_is_no_programs() -> None:
    plan = PublicationPlan({7}, lambda *_: None, 10, stand_ins={5000, 5001, 5002})
    plan.add_datagram_socket(listening(6, bytes(15) + b"\1", 5000))
    plan.add_datagram_socket(listening(4, ANY, 5001))
    plan.add_datagram_socket(listening(6, ANY, 5002))
    plan.add_datagram_socket(listening(6, bytes(15) + b"\1", 5003))
    assert plan.datagram_ports == {5001, 5002, 5003}


def test_a_listener_that_no_rule_names_is_not_published() -> None:
    assert publications([listening(4, ANY)], lambda *_: None) == []


def test_a_listener_of_another_cgroup_is_not_published() -> None:
    assert publications([listening(4, ANY, cgroup=8)], lambda *_: FIXED) == []


def test_a_listener_without_a_cgroup_id_counts_as_the_containers_own() -> None:
    assert len(publications([listening(4, ANY, cgroup=0)], lambda *_: FIXED)) == 1


def test_of_several_listeners_on_one_endpoint_the_widest_is_taken() -> None:
    found = publications([listening(4, LOOPBACK), listening(4, OWN), listening(4, ANY)], lambda *_: FIXED)
    assert [one.address for one in found] == [ANY]


def test_each_listener_on_a_dynamic_endpoint_has_a_port_of_its_own() -> None:
    found = publications([listening(4, ANY, 80), listening(4, ANY, 81)], lambda *_: DYNAMIC)
    assert sorted(one.port for one in found) == [80, 81]


def test_each_port_of_a_range_is_for_one_listener() -> None:
    def lookup(_family: int, _address: bytes, port: int) -> ResolvedEndpoint:
        return replace(FIXED, port=20000 + port)

    found = publications([listening(4, ANY, 80), listening(4, ANY, 81), listening(4, OWN, 81)], lookup)
    assert sorted((one.address, one.endpoint.port) for one in found) == [(ANY, 20080), (ANY, 20081)]


def test_a_listener_of_ipv6_alone_cannot_have_an_ipv4_endpoint() -> None:
    assert publications([listening(6, ANY, v6only=True)], lambda *_: FIXED) == []
    assert len(publications([listening(6, ANY, v6only=True)], lambda *_: SIX)) == 1


def test_a_mapped_address_is_looked_up_as_ipv4() -> None:
    asked = []

    def lookup(family: int, address: bytes, port: int) -> ResolvedEndpoint:
        asked.append((family, address, port))
        return FIXED

    publications([listening(6, MAPPED)], lookup)
    assert asked == [(4, OWN, 80)]


addresses = st.sampled_from([ANY, LOOPBACK, OWN])


@given(st.lists(st.builds(listening, st.just(4), addresses, st.integers(1, 4)), max_size=8), st.randoms())
def test_the_order_of_the_kernels_answer_makes_no_difference(found: list[ListeningSocket], chance: object) -> None:
    shuffled = list(found)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(publications(found, lambda *_: FIXED)) == set(publications(shuffled, lambda *_: FIXED))


def test_no_more_are_published_than_the_limit_and_published_ones_stay() -> None:
    found = [listening(4, ANY, port) for port in range(1, 10)]
    published = plan(found[6:8], lambda *_: DYNAMIC).publications
    planned = plan(found, lambda *_: DYNAMIC, 4, published)
    assert [one.port for one in planned.publications] == [1, 2, 7, 8]
    assert planned.too_many == 5


def test_the_list_of_unpublished_listeners_is_limited() -> None:
    found = [listening(4, ANY, port) for port in range(1, 1000)]
    planned = plan([*found, *found], lambda *_: None)
    assert list(planned.unpublished) == [(4, ANY, port) for port in range(1, MAX_UNPUBLISHED + 1)]
    assert planned.more_unpublished >= 999 - MAX_UNPUBLISHED
    assert not planned.publications


def test_of_several_listeners_on_one_endpoint_those_that_are_not_published_are_listed() -> None:
    assert list(plan([listening(4, ANY), listening(4, OWN)], lambda *_: FIXED).unpublished) == [(4, OWN, 80)]


def test_a_message_of_the_kernel_is_read() -> None:
    head = bytes([socket.AF_INET6, 10, 0, 0]) + (443).to_bytes(2, "big") + bytes(2) + ANY + ANY
    body = head + (0).to_bytes(4, "little") + bytes(8) + bytes(16) + (99).to_bytes(4, "little")
    v6only = b"\5\0\13\0\1\0\0\0".replace(b"\13", b"\x0b")
    group = b"\x0c\0\x15\0" + (4711).to_bytes(8, "little")
    assert parse_listener(body + v6only + group) == ListeningSocket(6, ANY, 443, True, 4711, 0, 99)


@pytest.mark.parametrize(
    ("endpoint", "v6only", "none"),
    [(SIX, False, True), (SIX, True, True), (DUAL, False, False), (DUAL, True, True), (FIXED, False, False)],
)
def test_an_ipv6_endpoint_takes_ipv4_only_where_it_says_so(
    endpoint: ResolvedEndpoint, v6only: bool, none: bool
) -> None:
    assert Publication(endpoint, 6, ANY, 80, v6only).takes_no_ipv4 is none
