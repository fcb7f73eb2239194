"""The pure parts of the fuzzer: sequences out of a seed, what a policy says, the judge, the shrinker."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from graft.model.endpoint import parse_endpoint
from graft.policy.reader import check_policy
from tests.fuzz import rules
from tests.fuzz.generate import generate
from tests.fuzz.judge import judge
from tests.fuzz.model import TRANSPORTS, Change, Egress, Endpoint, Ingress, Phase, Policy, Sequence, Transport, World
from tests.fuzz.seen import TCP, UDP, Datagram, Event, Observed, Packet, Stand, Timeline, parse_event, parse_packet
from tests.fuzz.shrink import shrink, without_pieces
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6

HOST = 7
WEB = Endpoint("web", "0.0.0.0", 25001)
SIX = Endpoint("six", "::", 25006)
OUT = Endpoint("out", HOST4, 0)
POLICY = Policy((Ingress("*", 80, 80, "web"),), (Egress(f"{CLIENT4}/32", (9001,), "out"),))
WORLD = World((WEB, SIX, OUT), POLICY)


# ---- sequences


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_seed_gives_the_same_sequence_again(transport: Transport) -> None:
    assert generate(5, transport) == generate(5, transport)
    assert generate(5, transport) != generate(6, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_sequence_survives_its_file(transport: Transport) -> None:
    for seed in range(50):
        sequence = generate(seed, transport)
        assert Sequence.from_json(sequence.to_json()) == sequence


def test_graft_takes_every_policy_that_is_made() -> None:
    for seed in range(100):
        sequence = generate(seed, "direct")
        changes = [change for phase in sequence.phases for change in (*phase.before, *phase.meanwhile)]
        policies = [sequence.world.policy, *(one.policy for one in changes if one.policy)]
        known = {one.name: parse_endpoint(one.name, one.spec, one.protocol) for one in sequence.world.endpoints}
        for policy in policies:
            assert check_policy(policy.text(), known).problems == ()


# ---- what a policy says


@pytest.mark.parametrize(
    ("address", "port", "becomes"),
    [("0.0.0.0", 80, ["web"]), ("127.0.0.1", 80, ["web"]), ("::", 80, ["web"]), ("::1", 80, []), ("0.0.0.0", 81, [])],
)
def test_a_bind_becomes_the_endpoint_of_its_rule(address: str, port: int, becomes: list[str]) -> None:
    assert [one.name for one in rules.bind_outcomes(WORLD, "tcp", address, port)] == becomes


def test_the_exact_address_comes_before_any_and_the_smaller_range_before_the_wider() -> None:
    wide, narrow, anywhere = Ingress("0.0.0.0", 1, 100, "web"), Ingress("0.0.0.0", 80, 80, "out"), POLICY.ingress[0]
    world = replace(WORLD, policy=replace(POLICY, ingress=(wide, anywhere)))
    assert rules.bind_rules(world, "tcp", "0.0.0.0", 80) == [wide]
    world = replace(WORLD, policy=replace(POLICY, ingress=(wide, narrow, anywhere)))
    assert rules.bind_rules(world, "tcp", "0.0.0.0", 80) == [narrow]
    assert rules.bind_rules(world, "tcp", HOST4, 80) == [anywhere]


@pytest.mark.parametrize(
    ("address", "port", "outcome"),
    [
        ("192.0.2.1", 80, "out"),
        ("10.1.1.1", 22, "deny"),
        ("10.1.1.1", 80, "out"),
        ("127.0.0.1", 80, ""),
        ("fd98::1", 80, "six"),
        ("fe80::1", 80, ""),
        ("::1", 80, ""),
    ],
)
def test_a_destination_gets_the_outcome_of_its_rule(address: str, port: int, outcome: str) -> None:
    egress = (Egress("0.0.0.0/0", (), "out"), Egress("10.0.0.0/8", (22,), "deny"), Egress("::/0", (), "six"))
    assert rules.egress_outcome(replace(WORLD, policy=Policy(egress=egress)), "tcp", address, port) == outcome


def test_a_wide_denial_holds_for_link_local_addresses() -> None:
    world = replace(WORLD, policy=Policy(egress=(Egress("::/0", (), "deny"),), connect="container"))
    assert not rules.may_reach(world, True, "tcp", "fe80::1", 80)


def test_an_endpoint_that_is_deleted_grants_nothing() -> None:
    world = Change("delete", name="out").of(WORLD)
    assert rules.may_reach(WORLD, False, "tcp", CLIENT4, 9001)
    assert not rules.may_reach(world, False, "tcp", CLIENT4, 9001)


def test_an_ipv6_endpoint_has_the_ipv4_port_where_it_says_so_only() -> None:
    assert not rules.stands_at(SIX, HOST4, 25006)
    assert rules.stands_at(replace(SIX, dual_stack=True), HOST4, 25006)


# ---- the judge


def seen(world: World = WORLD, transport: str = "swap", **what: object) -> Observed:
    timeline = Timeline([(world, 0, None)])
    empty = Observed(transport, HOST, frozenset((HOST4, HOST6, "127.0.0.1")), timeline, 0, 0, 1000)
    return replace(empty, **what)  # type: ignore[arg-type]


def call(words: str, begin: int = 10, result: int = 0, cookie: int = 1) -> Event:
    return Event(0, "self", "plain", tuple(words.split()), begin, begin + 10, result, cookie, HOST)


def syn(to: str = CLIENT4, port: int = 9001, source: str = HOST4, time: int = 15) -> Packet:
    return Packet(time, TCP, (source, 40000), (to, port), 2, 1)


def test_a_granted_connection_is_no_finding() -> None:
    assert judge(seen(packets=(syn(),))) == []


@pytest.mark.parametrize(
    "packet",
    [
        syn(port=9002),
        syn(to=CLIENT6, source=HOST6),
        syn(source="127.0.0.1"),
        syn(source="192.0.2.1"),
        replace(syn(), protocol=UDP, to=(CLIENT4, 53), flags=0),
        replace(syn(), odd=True),
        Packet(15, 1, (HOST4, 0), (CLIENT4, 0), flags=8),
        Packet(15, 136, (HOST4, 40000), (CLIENT4, 9001)),
    ],
    ids=["port", "family", "source", "foreign source", "datagram", "options", "echo", "other protocol"],
)
def test_a_packet_that_no_rule_grants_is_a_finding(packet: Packet) -> None:
    assert [one.rule for one in judge(seen(packets=(packet,)))] == ["packets"]


def test_a_policy_counts_from_the_begin_of_the_call_to_its_end() -> None:
    gone = replace(WORLD, policy=Policy())
    during = Timeline([(WORLD, 0, 12), (gone, 11, None)])
    before = Timeline([(WORLD, 0, 9), (gone, 8, None)])
    one = seen(packets=(syn(),), events=(call(f"connect 0 {CLIENT4} 9001", result=-115),))
    assert judge(replace(one, timeline=during)) == []
    assert len(judge(replace(one, timeline=before))) == 1


def answer(address: str = HOST4, port: int = 25001, time: int = 50) -> Packet:
    return Packet(time, TCP, (address, port), (CLIENT4, 61001), 0x12, 5)


def listener(address: str = "0.0.0.0", port: int = 25001) -> Stand:
    return Stand(TCP, True, (address, port), ("0.0.0.0", 0), 1, 99)


def test_a_listener_at_its_endpoint_may_be_reached() -> None:
    events = (call("bind 0 0.0.0.0 80"), call("listen 0 8", 30))
    assert judge(seen(events=events, sockets=(listener(),), packets=(answer(),))) == []


def test_a_listener_that_began_when_the_rule_was_removed_may_not() -> None:
    timeline = Timeline([(WORLD, 0, 22), (replace(WORLD, policy=Policy()), 21, None)])
    events = (call("bind 0 0.0.0.0 80"), call("listen 0 8", 30))
    found = judge(seen(timeline=timeline, events=events, sockets=(listener(),), packets=(answer(),)))
    assert [one.rule for one in found] == ["answers"]


def test_a_listener_at_a_port_of_the_kernels_choice_is_allowed_unless_it_is_reached() -> None:
    silent = seen(events=(call("listen 0 8"),), sockets=(listener(port=40000),))
    assert judge(silent) == []
    assert [one.rule for one in judge(replace(silent, packets=(answer(port=40000),)))] == ["answers"]


def test_a_socket_at_the_port_of_another_container_is_a_finding() -> None:
    assert [one.rule for one in judge(seen(sockets=(listener(port=25101),)))] == ["ports"]


def test_a_bind_becomes_what_its_own_rule_says() -> None:
    policy = replace(POLICY, ingress=(Ingress("*", 80, 80, "web"), Ingress("*", 81, 81, "six")))
    world, events = replace(WORLD, policy=policy), (call("bind 0 :: 81"),)
    assert judge(seen(world, events=events, sockets=(listener("::", 25006),))) == []
    assert [one.rule for one in judge(seen(world, events=events, sockets=(listener(),)))] == ["ports"]


RANGE = Endpoint("range", "0.0.0.0", 25024, last=25026)
RANGED = World((RANGE, OUT), Policy((Ingress("*", 80, 82, "range"),)))


def test_a_bind_becomes_the_one_port_of_a_range_that_is_its_own() -> None:
    assert RANGE.spec == "0.0.0.0:25024-25026"
    events = (call("bind 0 0.0.0.0 81"),)
    assert judge(seen(RANGED, events=events, sockets=(listener(port=25025),))) == []
    for other in (25024, 25026):
        found = judge(seen(RANGED, events=events, sockets=(listener(port=other),)))
        assert [one.rule for one in found] == ["ports"]


def test_a_rule_for_port_0_is_for_binds_of_port_0() -> None:
    world = World((replace(OUT, address="0.0.0.0"),), Policy((Ingress("*", 0, 0, "out"),)))
    for port, rule in ((0, []), (80, ["ports"])):
        events = (call(f"bind 0 0.0.0.0 {port}"),)
        assert [one.rule for one in judge(seen(world, events=events, sockets=(listener(port=40000),)))] == rule


def test_a_strangers_datagram_may_reach_only_a_socket_bound_to_an_endpoint() -> None:
    one = Datagram(50, (CLIENT4, 61001), (HOST4, 25001), 1)
    bound = call("bind 0 0.0.0.0 80")
    assert judge(seen(received=(one,), events=(bound,))) == []
    other = replace(one, to=(HOST4, 40000))
    assert [one.rule for one in judge(seen(received=(other,), events=(call(f"send 0 {CLIENT4} 9001 0"),)))] == [
        "datagrams"
    ]
    assert judge(seen(received=(replace(other, source=(CLIENT4, 9001)),), events=(bound,))) == []


def test_in_direct_what_no_rule_names_is_the_defaults() -> None:
    free = replace(WORLD, policy=Policy(bind="container", connect="container"))
    packets = replace(syn(port=9), odd=True), answer(port=8080)
    one = seen(free, "direct", packets=packets, groups=("eth0 224.0.0.251",))
    assert judge(one) == []
    assert {one.rule for one in judge(replace(one, transport="swap"))} == {"packets", "answers", "groups"}


# ---- packets, answers


def test_an_ipv4_packet_with_options_is_odd() -> None:
    plain = bytes([0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 98, 0, 1, 10, 98, 0, 2])
    rest = struct.pack(">HHIIBB", 40000, 9001, 7, 0, 0x50, 2)
    assert parse_packet(plain + rest, 3) == Packet(3, TCP, (HOST4, 40000), (CLIENT4, 9001), 2, 7)
    odd = parse_packet(bytes([0x46, *plain[1:], 7, 3, 4, 0]) + rest, 3)
    assert odd is not None and odd.odd and odd.to == (CLIENT4, 9001)


def test_an_ipv6_packet_with_a_header_between_is_odd() -> None:
    addresses = bytes.fromhex("fd98000000000000000000000000000" + "1" + "fd98000000000000000000000000000" + "2")
    packet = parse_packet(bytes([0x60, 0, 0, 0, 0, 16, 60, 64]) + addresses + bytes([17, 0]) + bytes(6)
                          + struct.pack(">HHHH", 40000, 53, 8, 0), 3)  # fmt: skip
    assert packet == Packet(3, UDP, (HOST6, 40000), (CLIENT6, 53), odd=True)


@pytest.mark.parametrize("data", [b"", b"\x45", b"\x60" + bytes(30), b"\x00" * 60])
def test_what_is_no_packet_is_none(data: bytes) -> None:
    assert parse_packet(data, 0) is None


def test_an_answer_of_the_program() -> None:
    event = parse_event(["0 self plain socket 1 2 1 0", "2 lent int80 bind 1 ::ffff:0.0.0.0 80"], "e 1 5 6 -13 42 7")
    assert event == Event(2, "lent", "int80", ("bind", "1", "::ffff:0.0.0.0", "80"), 5, 6, -13, 42, 7)
    assert event.asked == ("0.0.0.0", 80)


# ---- the shrinker


def test_pieces_are_left_out_from_halves_to_single_ones() -> None:
    assert list(without_pieces("abc")) == [("c",), ("a", "b"), ("b", "c"), ("a", "c"), ("a", "b")]
    assert list(without_pieces("a")) == [()]
    assert list(without_pieces("")) == []


def test_only_what_makes_a_sequence_fail_is_left() -> None:
    policy = replace(POLICY, egress=(*POLICY.egress, Egress("::/0", (), "six")))
    phases = [Phase((Change("delete", name="six"),), (f"0 self plain listen {n} 8", "nap")) for n in range(4)]
    sequence = Sequence(1, "swap", replace(WORLD, policy=policy), tuple(phases))

    def fails(one: Sequence) -> bool:
        calls = [call for phase in one.phases for call in phase.calls]
        return "0 self plain listen 2 8" in calls and POLICY.ingress[0] in one.world.policy.ingress

    found = shrink(sequence, fails)
    assert found.size == 1 and found.world == World((WEB,), Policy(POLICY.ingress))
    assert fails(found)


def test_the_shrinker_tries_no_more_often_than_it_may() -> None:
    asked: list[Sequence] = []

    def fails(one: Sequence) -> bool:
        asked.append(one)
        return False

    shrink(generate(1, "direct"), fails, tries=5)
    assert len(asked) == 5
