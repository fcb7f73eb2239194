"""Compiled entries, compared with matchers that know only the meaning of the rules.

`bind_entry` and `connect_entry` do what the hooks do: look the entries up by longest prefix. `bind_meaning`
and `connect_meaning` read the rules one by one, as docs/policy.md puts it, and know nothing of prefixes of ports, of
nodes, or of the order of lookups.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graft.errors import UsageError
from graft.model.address import BindPattern, IPAddress, Prefix, pack16, unmapped
from graft.model.endpoint import IP_PROTOCOLS, Endpoint, Protocol, parse_endpoint
from graft.model.ports import PortRange, mapped_port
from graft.policy.compiler import EgressPortEntry, EgressPrefixEntry, RuleSet, compile_policy
from graft.policy.limits import MAX_RULES
from graft.policy.model import Default, EgressRule, IngressRule, Policy, PolicyError, Verdict, policy_from_flags
from graft.policy.reader import load_policy
from graft.policy.validator import check_rules

ENDPOINTS = {
    endpoint.name: endpoint
    for endpoint in (
        parse_endpoint("a4", "0.0.0.0:8080"),
        parse_endpoint("b4", "10.0.0.1:dynamic"),
        parse_endpoint("r4", "0.0.0.0:9000-9009"),
        parse_endpoint("r6", "[::]:9000-9002"),
        parse_endpoint("t4", "0.0.0.0:8081", proto="tcp"),
        parse_endpoint("a6", "[::]:8080"),
        parse_endpoint("b6", "[2001:db8::1]:dynamic"),
        parse_endpoint("u6", "[::]:8081", proto="udp"),
    )
}

TCP, UDP = IP_PROTOCOLS[Protocol.TCP], IP_PROTOCOLS[Protocol.UDP]


# What the hooks do.


Bound = tuple[str, int]
"""An endpoint, and which of its ports; 0: a dynamic one."""


def bind_entry(rules: RuleSet, protocol: Protocol, address: IPAddress, port: int) -> Bound | None:
    """Longest prefix under the exact address, then under "any"."""
    address = unmapped(address)
    for wanted in (pack16(address), None):
        found = [
            entry
            for entry in rules.ingress
            if (entry.protocol, entry.family, entry.address) == (IP_PROTOCOLS[protocol], address.version, wanted)
            and same_bits(entry.port, port, 16, entry.port_bits)
        ]
        if found:
            entry = max(found, key=lambda entry: entry.port_bits)
            target = ENDPOINTS[entry.endpoint]
            mapped = mapped_port(port, entry.first_port, target.port, target.last_port)
            assert mapped is not None
            return entry.endpoint, mapped
    return None


def connect_entry(rules: RuleSet, protocol: Protocol, address: IPAddress, port: int) -> tuple[Verdict, str | None]:
    """Longest prefix of the destination, then longest prefix of the port under its node."""
    address = unmapped(address)
    number = int.from_bytes(pack16(address))
    prefixes = [
        entry
        for entry in rules.egress_prefixes
        if (entry.protocol, entry.family) == (IP_PROTOCOLS[protocol], address.version)
        and same_bits(int.from_bytes(entry.address), number, 128, entry.prefix_len)
    ]
    if not prefixes:
        return Verdict.NONE, None
    node = max(prefixes, key=lambda entry: entry.prefix_len).node
    ports = [
        entry for entry in rules.egress_ports if entry.node == node and same_bits(entry.port, port, 16, entry.port_bits)
    ]
    if not ports:
        return Verdict.NONE, None
    entry = max(ports, key=lambda entry: entry.port_bits)
    return entry.verdict, entry.endpoint


def same_bits(one: int, other: int, width: int, bits: int) -> bool:
    return one >> (width - bits) == other >> (width - bits)


# What the rules mean.


def bind_meaning(policy: Policy, protocol: Protocol, address: IPAddress, port: int) -> Bound | None:
    """A rule for the exact address takes precedence over "any", and the smaller range of ports over the bigger."""
    address = unmapped(address)
    matching = [
        rule
        for rule in policy.ingress
        if protocol in (rule.protocols or ENDPOINTS[rule.endpoint].protocols)
        and rule.bind.ports.first <= port <= rule.bind.ports.last
    ]
    exact = [rule for rule in matching if rule.bind.address == address]
    of_any = [
        rule
        for rule in matching
        if rule.bind.address is None and ENDPOINTS[rule.endpoint].address.version == address.version
    ]
    for rules in (exact, of_any):
        if rules:
            rule = min(rules, key=lambda rule: rule.bind.ports.last - rule.bind.ports.first)
            target = ENDPOINTS[rule.endpoint]
            return target.name, target.port + (port - rule.bind.ports.first if target.port_count > 1 else 0)
    if address == ip_address("::"):
        return bind_meaning(policy, protocol, ip_address("0.0.0.0"), port)
    return None


BY_NAME = [ip_network(one) for one in ("fe80::/10", "ff00::/8", "224.0.0.0/4", "255.255.255.255")]
"""Link-local, multicast and broadcast."""


def is_by_name(network: IPv4Network | IPv6Network) -> bool:
    return any(network.version == one.version and network.subnet_of(one) for one in BY_NAME)  # type: ignore[arg-type]


def connect_meaning(policy: Policy, protocol: Protocol, address: IPAddress, port: int) -> tuple[Verdict, str | None]:
    """The longest prefix whose rule has the port. To loopback only rules inside loopback apply, and
    only rules for link-local destinations, multicast and broadcast grant those.
    """
    address = unmapped(address)
    matching = [
        rule
        for rule in policy.egress
        if protocol in rule_protocols(rule)
        and address in rule.to.network
        and (rule.ports is None or any(ports.first <= port <= ports.last for ports in rule.ports))
    ]
    if address.is_loopback or address.is_unspecified:
        matching = [rule for rule in matching if is_loopback(rule.to.network)]
    if any(address in one for one in BY_NAME):
        matching = [rule for rule in matching if rule.verdict is not Verdict.GRANT or is_by_name(rule.to.network)]
    if not matching:
        return Verdict.NONE, None
    rule = max(matching, key=lambda rule: rule.to.network.prefixlen)
    return rule.verdict, rule.endpoint


def rule_protocols(rule: EgressRule) -> Protocol:
    if rule.protocols is not None:
        return rule.protocols
    return Protocol.TCP | Protocol.UDP if rule.endpoint is None else ENDPOINTS[rule.endpoint].protocols


def is_loopback(network: IPv4Network | IPv6Network) -> bool:
    if isinstance(network, IPv4Network):
        return network.subnet_of(IPv4Network("127.0.0.0/8"))
    return network == ip_network("::1/128")


# Random policies: few addresses and few ports, so that rules conflict.

PROTOCOLS = st.sampled_from(list(Protocol))
RULE_PROTOCOLS = st.sampled_from([None, None, Protocol.TCP, Protocol.UDP, Protocol.TCP | Protocol.UDP])
PORT_NUMBERS = st.one_of(st.sampled_from([1, 2, 79, 80, 81, 443, 1023, 1024, 65534, 65535]), st.integers(1, 65535))
SMALL_RANGES = st.tuples(st.integers(75, 85), st.sampled_from([3, 10])).map(
    lambda pair: PortRange(pair[0], sum(pair) - 1)
)
RANGES = st.one_of(
    st.tuples(PORT_NUMBERS, PORT_NUMBERS).map(lambda pair: PortRange(*sorted(pair))),
    PORT_NUMBERS.map(lambda port: PortRange(port, port)),
)
BIND_ADDRESSES = st.sampled_from(["0.0.0.0", "127.0.0.1", "10.0.0.1", "::", "::1", "2001:db8::1"]).map(ip_address)
PREFIXES = st.one_of(
    st.sampled_from(
        (
            *("0.0.0.0/0", "0.0.0.0/1", "0.0.0.0/8", "0.0.0.0/31", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32"),
            *("224.0.0.0/4", "224.0.0.251/32", "255.255.255.255/32", "224.0.0.0/3", "ff02::/16"),
            *("64.0.0.0/2", "127.0.0.0/8", "127.0.0.1/32", "127.1.0.0/16"),
            *("::/0", "::/64", "::/127", "::1/128", "::2/127", "8000::/1", "2001:db8::/32", "2001:db8::1/128"),
        )
    ).map(ip_network),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 31)).map(lambda pair: IPv4Network(pair, strict=False)),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(1, 127)).map(lambda pair: IPv6Network(pair, strict=False)),
).map(Prefix)
VERDICTS = st.one_of(
    st.sampled_from([(Verdict.DENY, None), (Verdict.CONTAINER, None)]),
    st.sampled_from(sorted(ENDPOINTS)).map(lambda name: (Verdict.GRANT, name)),
)
INGRESS_RULES = st.builds(
    IngressRule,
    bind=st.builds(BindPattern, st.none() | BIND_ADDRESSES, RANGES | SMALL_RANGES | st.just(PortRange(0, 0))),
    endpoint=st.sampled_from(sorted(ENDPOINTS)),
    protocols=RULE_PROTOCOLS,
)
EGRESS_RULES = st.builds(
    lambda to, verdict, ports, protocols: EgressRule(to, verdict[0], verdict[1], ports, protocols),
    to=PREFIXES,
    verdict=VERDICTS,
    ports=st.none() | st.lists(RANGES, min_size=1, max_size=3).map(tuple),
    protocols=RULE_PROTOCOLS,
)


def sound(policy: Policy) -> Policy:
    """``policy`` without the rules that would be refused."""
    kept = Policy(policy.name)
    for rule in policy.ingress:
        tried = Policy(policy.name, ingress=(*kept.ingress, rule))
        kept = tried if not check_rules(tried, ENDPOINTS) else kept
    egress: tuple[EgressRule, ...] = ()
    for out in policy.egress:
        if not check_rules(Policy(policy.name, egress=(*egress, out)), ENDPOINTS):
            egress = (*egress, out)
    return Policy(policy.name, ingress=kept.ingress, egress=egress)


POLICIES = st.builds(
    Policy,
    name=st.just("random"),
    ingress=st.lists(INGRESS_RULES, max_size=8).map(tuple),
    egress=st.lists(EGRESS_RULES, max_size=8).map(tuple),
)


@st.composite
def asked_binds(draw: st.DrawFn, policy: Policy) -> tuple[IPAddress, int]:
    edges = [port for rule in policy.ingress for port in around(rule.bind.ports)]
    address = draw(BIND_ADDRESSES | st.sampled_from(["::ffff:10.0.0.1", "192.0.2.9", "2001:db8::9"]).map(ip_address))
    return address, draw(st.sampled_from([0, *edges]) | PORT_NUMBERS if edges else PORT_NUMBERS)


@st.composite
def asked_destinations(draw: st.DrawFn, policy: Policy) -> tuple[IPAddress, int]:
    edges = [port for rule in policy.egress for ports in rule.ports or () for port in around(ports)]
    inside = [ip for rule in policy.egress for ip in (rule.to.network[0], rule.to.network[-1])]
    special = ["224.0.0.251", "239.1.1.1", "255.255.255.255", "255.255.255.254", "ff02::fb", "fe80::1"]
    special += ["127.0.0.1", "127.255.255.255", "0.0.0.0", "::1", "::", "128.0.0.0", "::ffff:127.0.0.1", "10.1.2.3"]
    addresses = st.sampled_from(special).map(ip_address) | st.ip_addresses()
    address = draw(st.sampled_from(inside) | addresses if inside else addresses)
    return address, draw(st.sampled_from(edges) | PORT_NUMBERS if edges else PORT_NUMBERS)


def around(ports: PortRange) -> list[int]:
    return [port for port in (ports.first - 1, ports.first, ports.last, ports.last + 1) if 1 <= port <= 65535]


@given(policy=POLICIES.map(sound), protocol=PROTOCOLS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_bind_finds_the_endpoint_that_the_rules_mean(policy: Policy, protocol: Protocol, data: st.DataObject) -> None:
    assume(policy.ingress)
    rules = compile_policy(policy, ENDPOINTS)
    for _ in range(8):
        address, port = data.draw(asked_binds(policy))
        assert bind_entry(rules, protocol, address, port) == bind_meaning(policy, protocol, address, port)


@given(policy=POLICIES.map(sound), protocol=PROTOCOLS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_destination_finds_the_verdict_that_the_rules_mean(
    policy: Policy, protocol: Protocol, data: st.DataObject
) -> None:
    assume(policy.egress)
    rules = compile_policy(policy, ENDPOINTS)
    for _ in range(8):
        address, port = data.draw(asked_destinations(policy))
        assert connect_entry(rules, protocol, address, port) == connect_meaning(policy, protocol, address, port)


@given(POLICIES.map(sound))
@settings(deadline=None)
def test_no_two_entries_have_one_key(policy: Policy) -> None:
    rules = compile_policy(policy, ENDPOINTS)
    keys = Counter((e.protocol, e.family, e.address, e.port, e.port_bits) for e in rules.ingress)
    prefixes = Counter((e.protocol, e.family, e.address, e.prefix_len) for e in rules.egress_prefixes)
    ports = Counter((e.node, e.port, e.port_bits) for e in rules.egress_ports)
    assert all(count == 1 for counter in (keys, prefixes, ports) for count in counter.values())


@given(POLICIES.map(sound))
@settings(deadline=None)
def test_entries_have_the_form_of_the_maps(policy: Policy) -> None:
    rules = compile_policy(policy, ENDPOINTS)
    ports = [(entry.port, entry.port_bits) for entry in rules.ingress]
    ports += [(entry.port, entry.port_bits) for entry in rules.egress_ports]
    for port, bits in ports:
        assert 0 <= bits <= 16
        assert port % (1 << (16 - bits)) == 0, "bits behind the prefix are zero"
    for entry in rules.egress_prefixes:
        assert len(entry.address) == 16
        assert entry.prefix_len <= (32 if entry.family == 4 else 128)
    assert all(entry.address is None or len(entry.address) == 16 for entry in rules.ingress)
    nodes = {entry.node for entry in rules.egress_prefixes}
    assert {entry.node for entry in rules.egress_ports} <= nodes
    assert nodes == set(range(1, len(nodes) + 1))
    assert all((entry.endpoint is not None) == (entry.verdict is Verdict.GRANT) for entry in rules.egress_ports)
    assert rules.entries == len(rules.ingress) + len(rules.egress_prefixes) + len(rules.egress_ports)


@given(POLICIES.map(sound), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_rules_does_not_matter(policy: Policy, random: Random) -> None:
    shuffled = list(policy.egress)
    random.shuffle(shuffled)
    again = Policy(policy.name, ingress=policy.ingress[::-1], egress=tuple(shuffled))
    assert set(compile_policy(again, ENDPOINTS).ingress) == set(compile_policy(policy, ENDPOINTS).ingress)
    assert check_rules(again, ENDPOINTS) == []


def binds_conflict(one: IngressRule, other: IngressRule) -> bool:
    """Whether some bind has two rules with no smaller range that make different things of it. Port by port."""
    a, b = ENDPOINTS[one.endpoint], ENDPOINTS[other.endpoint]
    same = a == b and (a.port_count == 1 or one.bind.ports.first == other.bind.ports.first)
    if same or not (one.protocols or a.protocols) & (other.protocols or b.protocols):
        return False
    if one.bind.address != other.bind.address or (one.bind.address is None and a.family != b.family):
        return False
    mine = set(range(one.bind.ports.first, one.bind.ports.last + 1))
    yours = set(range(other.bind.ports.first, other.bind.ports.last + 1))
    return bool(mine & yours) and not (mine < yours or yours < mine)


def destinations_conflict(one: EgressRule, other: EgressRule) -> bool:
    if one.to != other.to or not rule_protocols(one) & rule_protocols(other):
        return False
    if (one.verdict, one.endpoint) == (other.verdict, other.endpoint):
        return False
    every = (PortRange(0, 65535),)
    return any(p.first <= q.last and q.first <= p.last for p in one.ports or every for q in other.ports or every)


@given(INGRESS_RULES, INGRESS_RULES)
@settings(max_examples=300, deadline=None)
def test_two_binds_are_refused_exactly_where_they_conflict(one: IngressRule, other: IngressRule) -> None:
    alone = [check_rules(Policy("p", ingress=(rule,)), ENDPOINTS) for rule in (one, other)]
    assume(alone == [[], []])
    assert bool(check_rules(Policy("p", ingress=(one, other)), ENDPOINTS)) == binds_conflict(one, other)


@given(EGRESS_RULES, EGRESS_RULES)
@settings(max_examples=300, deadline=None)
def test_two_destinations_are_refused_exactly_where_they_conflict(one: EgressRule, other: EgressRule) -> None:
    alone = [check_rules(Policy("p", egress=(rule,)), ENDPOINTS) for rule in (one, other)]
    assume(alone == [[], []])
    assert bool(check_rules(Policy("p", egress=(one, other)), ENDPOINTS)) == destinations_conflict(one, other)


@given(st.lists(INGRESS_RULES, max_size=6), st.lists(EGRESS_RULES, max_size=6))
@settings(deadline=None)
def test_of_many_rules_those_in_conflict_with_an_earlier_one_are_refused(
    ingress: list[IngressRule], egress: list[EgressRule]
) -> None:
    binds = [replace(rule, field=f"in {n}") for n, rule in enumerate(ingress) if is_sound_alone(ingress=(rule,))]
    outs = [replace(rule, field=f"out {n}") for n, rule in enumerate(egress) if is_sound_alone(egress=(rule,))]
    refused = {rule.field for n, rule in enumerate(binds) if any(binds_conflict(rule, other) for other in binds[:n])}
    refused |= {
        rule.field for n, rule in enumerate(outs) if any(destinations_conflict(rule, other) for other in outs[:n])
    }
    problems = check_rules(Policy("p", ingress=tuple(binds), egress=tuple(outs)), ENDPOINTS)
    assert {problem.field for problem in problems} == refused
    assert len(problems) == len(refused)


def is_sound_alone(ingress: tuple[IngressRule, ...] = (), egress: tuple[EgressRule, ...] = ()) -> bool:
    return not check_rules(Policy("p", ingress=ingress, egress=egress), ENDPOINTS)


# Cases that a reader can follow.


def compiled(text: str) -> RuleSet:
    return compile_policy(load_policy("name: p\n" + text, "p", ENDPOINTS), ENDPOINTS)


def bound(rules: RuleSet, address: str, port: int, protocol: Protocol = Protocol.TCP) -> str | None:
    found = bind_entry(rules, protocol, ip_address(address), port)
    return found and found[0]


def bound_port(rules: RuleSet, address: str, port: int) -> int | None:
    found = bind_entry(rules, Protocol.TCP, ip_address(address), port)
    return found and found[1]


def reached(rules: RuleSet, address: str, port: int = 80) -> tuple[Verdict, str | None]:
    return connect_entry(rules, Protocol.TCP, ip_address(address), port)


NOTHING = (Verdict.NONE, None)


def test_a_rule_for_an_address_matches_no_other_address() -> None:
    rules = compiled("ingress: [{bind: 0.0.0.0:80, endpoint: a4}]")
    assert bound(rules, "0.0.0.0", 80) == "a4"
    assert bound(rules, "127.0.0.1", 80) is None
    assert bound(rules, "0.0.0.0", 81) is None


def test_the_exact_address_takes_precedence_over_any() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:1-1000', endpoint: a4}, {bind: '*:80', endpoint: b4}]")
    assert bound(rules, "0.0.0.0", 80) == "a4"
    assert bound(rules, "10.0.0.1", 80) == "b4"


def test_the_inner_range_takes_precedence_over_the_outer() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:1-1000', endpoint: a4}, {bind: '0.0.0.0:80-90', endpoint: b4}]")
    assert [bound(rules, "0.0.0.0", port) for port in (79, 80, 90, 91, 1001)] == ["a4", "b4", "b4", "a4", None]


def test_a_range_is_mapped_port_by_port_also_around_a_hole_in_it() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:80-89', endpoint: r4}, {bind: '0.0.0.0:85', endpoint: a4}]")
    assert [bound_port(rules, "0.0.0.0", port) for port in (79, 80, 84, 85, 86, 89, 90)] == [
        *(None, 9000, 9004, 8080, 9006, 9009, None)
    ]
    assert bound_port(rules, "::", 86) == 9006


def test_one_endpoint_may_serve_two_ranges_each_from_its_own_beginning() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:80-89', endpoint: r4}, {bind: '0.0.0.0:90-99', endpoint: r4}]")
    assert [bound_port(rules, "0.0.0.0", port) for port in (80, 89, 90, 99)] == [9000, 9009, 9000, 9009]


def test_a_bind_of_port_0_has_an_entry_of_its_own() -> None:
    rules = compiled("ingress: [{bind: '*:0', endpoint: b4}, {bind: '*:1-65535', endpoint: a4}]")
    assert [bound(rules, "0.0.0.0", port) for port in (0, 1, 65535)] == ["b4", "a4", "a4"]
    assert bound(rules, "::", 0) == "b4"
    rules = compiled("ingress: [{bind: '*:1-65535', endpoint: a4}]")
    assert bound(rules, "0.0.0.0", 0) is None


def test_a_dual_stack_bind_gets_what_ipv4_has() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:80', endpoint: a4}, {bind: '*:81', endpoint: b4}]")
    assert bound(rules, "::", 80) == "a4"
    assert bound(rules, "::", 81) == "b4"
    assert bound(rules, "::1", 81) is None, "an IPv4 endpoint cannot serve a specific IPv6 address"


@pytest.mark.parametrize("bind", ["[::]:80", "*:80"])
def test_an_ipv6_rule_takes_precedence_for_a_dual_stack_bind(bind: str) -> None:
    rules = compiled(f"ingress: [{{bind: '0.0.0.0:80-81', endpoint: a4}}, {{bind: '{bind}', endpoint: a6}}]")
    assert bound(rules, "::", 80) == "a6"
    assert bound(rules, "::", 81) == "a4"
    assert bound(rules, "0.0.0.0", 80) == "a4"


def test_an_ipv6_rule_for_udp_leaves_the_dual_stack_bind_of_tcp_alone() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:80', endpoint: a4}, {bind: '*:80', endpoint: u6}]")
    assert bound(rules, "::", 80, Protocol.TCP) == "a4"
    assert bound(rules, "::", 80, Protocol.UDP) == "u6"


def test_any_with_an_ipv6_endpoint_serves_every_ipv6_address() -> None:
    rules = compiled("ingress: [{bind: '*:80', endpoint: a6}]")
    assert [bound(rules, address, 80) for address in ("::", "::1", "2001:db8::9")] == ["a6"] * 3
    assert bound(rules, "0.0.0.0", 80) is None


def test_a_mapped_bind_is_an_ipv4_bind() -> None:
    rules = compiled("ingress: [{bind: '[::ffff:10.0.0.1]:80', endpoint: a4}]")
    assert bound(rules, "10.0.0.1", 80) == bound(rules, "::ffff:10.0.0.1", 80) == "a4"


def test_a_rule_is_for_the_protocols_of_its_endpoint() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:80', endpoint: t4}]")
    assert {entry.protocol for entry in rules.ingress} == {TCP}


def test_a_rule_can_be_for_one_protocol_only() -> None:
    rules = compiled("ingress: [{bind: '0.0.0.0:53', endpoint: a4, protocol: udp}]")
    assert {entry.protocol for entry in rules.ingress} == {UDP}


def test_every_port_is_one_entry() -> None:
    rules = compiled("egress: [{to: 10.0.0.0/8, action: deny}]")
    assert rules.egress_ports == (EgressPortEntry(1, 0, 0, Verdict.DENY, None),)


def test_the_longest_prefix_wins() -> None:
    rules = compiled("egress: [{to: 0.0.0.0/0, endpoint: b4}, {to: 10.0.0.0/8, action: deny}]")
    assert reached(rules, "10.1.1.1") == (Verdict.DENY, None)
    assert reached(rules, "192.0.2.1") == (Verdict.GRANT, "b4")
    assert reached(rules, "2001:db8::1") == NOTHING


def test_a_shorter_prefix_gets_the_ports_that_a_longer_one_leaves() -> None:
    rules = compiled("egress: [{to: 10.0.0.0/8, action: deny, ports: [22]}, {to: 0.0.0.0/0, endpoint: b4}]")
    assert reached(rules, "10.1.1.1", 22) == (Verdict.DENY, None)
    assert reached(rules, "10.1.1.1", 80) == (Verdict.GRANT, "b4")


def test_a_port_that_no_prefix_has_is_left_to_the_default() -> None:
    rules = compiled(
        "egress: [{to: 10.0.0.0/8, action: deny, ports: [22]}, {to: 0.0.0.0/0, endpoint: b4, ports: [80]}]"
    )
    assert reached(rules, "10.1.1.1", 443) == NOTHING


@pytest.mark.parametrize("verdict", ["endpoint: b4", "action: deny", "action: container"])
@pytest.mark.parametrize("prefix", ["0.0.0.0/0", "0.0.0.0/1", "126.0.0.0/7"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.255.255.255", "0.0.0.0", "::ffff:127.0.0.1"])
def test_a_wider_rule_never_covers_loopback(address: str, prefix: str, verdict: str) -> None:
    assert reached(compiled(f"egress: [{{to: {prefix}, {verdict}}}]"), address) == NOTHING


@pytest.mark.parametrize("prefix", ["::/0", "::/64", "::/127"])
@pytest.mark.parametrize("address", ["::1", "::"])
def test_a_wider_ipv6_rule_never_covers_loopback(address: str, prefix: str) -> None:
    assert reached(compiled(f"egress: [{{to: '{prefix}', endpoint: b6}}]"), address) == NOTHING


def test_a_wider_rule_grants_no_link_local_destination_but_denies_it() -> None:
    assert reached(compiled("egress: [{to: '::/0', endpoint: b6}]"), "fe80::1") == NOTHING
    assert reached(compiled("egress: [{to: 'fe80::/10', endpoint: b6}]"), "fe80::1") == (Verdict.GRANT, "b6")
    assert reached(compiled("egress: [{to: '::/0', action: deny}]"), "fe80::1") == (Verdict.DENY, None)
    narrower = compiled("egress: [{to: '::/0', action: deny}, {to: 'fe00::/7', endpoint: b6}]")
    assert reached(narrower, "fe80::1") == (Verdict.DENY, None)


def test_a_wider_rule_grants_no_multicast_destination_of_ipv6_but_denies_it() -> None:
    assert reached(compiled("egress: [{to: '::/0', endpoint: b6}]"), "ff02::1") == NOTHING
    assert reached(compiled("egress: [{to: 'ff02::1', endpoint: b6}]"), "ff02::1") == (Verdict.GRANT, "b6")
    assert reached(compiled("egress: [{to: '::/0', action: deny}]"), "ff02::1") == (Verdict.DENY, None)


def test_a_rule_inside_loopback_applies_to_it() -> None:
    rules = compiled(
        "egress: [{to: 0.0.0.0/0, action: deny}, {to: 127.0.0.1, endpoint: b4, ports: [80]}, {to: '::1', endpoint: b6}]"
    )
    assert reached(rules, "127.0.0.1", 80) == (Verdict.GRANT, "b4")
    assert reached(rules, "127.0.0.1", 81) == NOTHING, "and inherits nothing from outside of it"
    assert reached(rules, "127.0.0.2", 80) == NOTHING
    assert reached(rules, "::1", 80) == (Verdict.GRANT, "b6")


def test_a_rule_for_all_of_loopback_is_inherited_inside_it() -> None:
    rules = compiled("egress: [{to: 127.0.0.0/8, action: deny}, {to: 127.0.0.1, endpoint: b4, ports: [80]}]")
    assert reached(rules, "127.0.0.1", 80) == (Verdict.GRANT, "b4")
    assert reached(rules, "127.0.0.1", 81) == (Verdict.DENY, None)
    assert reached(rules, "0.0.0.0", 81) == NOTHING


def test_special_prefixes_are_there_only_where_a_wider_rule_is() -> None:
    assert len(compiled("egress: [{to: 10.0.0.0/8, action: deny, protocol: tcp}]").egress_prefixes) == 1
    wide = compiled("egress: [{to: 0.0.0.0/0, action: deny, protocol: tcp}]").egress_prefixes
    assert {(entry.address[0], entry.prefix_len) for entry in wide} == {
        *((0, 0), (127, 8), (0, 32), (224, 4), (255, 32))
    }


def test_prefixes_with_the_same_ports_share_a_node() -> None:
    rules = compiled("egress: [{to: 10.0.0.0/8, endpoint: b4}, {to: 192.0.2.0/24, endpoint: b4}]")
    assert {entry.node for entry in rules.egress_prefixes} == {1}
    assert len(rules.egress_ports) == 1


def test_an_empty_policy_has_no_entries() -> None:
    rules = compile_policy(Policy("p", bind_default=Default.DENY), {})
    assert rules == RuleSet((), (), (), Default.DENY, Default.CONTAINER)
    assert rules.entries == 0


def test_a_policy_whose_endpoint_does_not_exist_is_refused() -> None:
    with pytest.raises(PolicyError, match="endpoint 'a4' not found"):
        compile_policy(policy_from_flags("p", ["0.0.0.0:80=a4"], []), {})


def test_a_policy_whose_endpoint_has_changed_its_family_is_refused() -> None:
    changed: dict[str, Endpoint] = {"a4": parse_endpoint("a4", "[::]:80")}
    with pytest.raises(PolicyError, match="an IPv4 bind cannot be redirected to the IPv6 endpoint a4"):
        compile_policy(policy_from_flags("p", ["0.0.0.0:80=a4"], []), changed)


def test_flags_that_are_in_conflict_name_each_other() -> None:
    policy = policy_from_flags("p", ["0.0.0.0:80=a4", "0.0.0.0:80=b4"], [])
    with pytest.raises(PolicyError) as caught:
        compile_policy(policy, ENDPOINTS)
    assert "-i 0.0.0.0:80=b4: " in caught.value.message
    assert "-i 0.0.0.0:80=a4 redirects 0.0.0.0:80 to a4" in caught.value.message


@pytest.mark.parametrize("flag", ["-i", "-e"])
def test_more_flags_than_a_policy_may_have_rules_are_refused(flag: str) -> None:
    ingress, egress = ["0.0.0.0:80=a4"], ["10.0.0.0/8=a4"]
    several = policy_from_flags("p", ingress * (MAX_RULES + (flag == "-i")), egress * (MAX_RULES + (flag == "-e")))
    with pytest.raises(UsageError, match=f"more than {MAX_RULES} of them"):
        compile_policy(several, ENDPOINTS)


def test_what_a_policy_declares_is_compiled_with_it() -> None:
    policy = load_policy("name: p\nendpoints: {own: 0.0.0.0:1}\ningress: [{bind: '*:80', endpoint: own}]", "p")
    assert {entry.endpoint for entry in compile_policy(policy, {}).ingress} == {"own"}


def test_an_entry_of_a_prefix_names_its_first_address() -> None:
    rules = compiled("egress: [{to: 10.0.0.0/8, endpoint: t4}]")
    assert rules.egress_prefixes == (EgressPrefixEntry(TCP, 4, b"\x0a" + bytes(15), 8, 1),)


def test_the_matchers_of_this_test_know_mapped_addresses() -> None:
    assert unmapped(IPv6Address("::ffff:1.2.3.4")) == IPv4Address("1.2.3.4")
