"""Checks whether the rules of a policy fit their endpoints and each other.

Policies from files and from flags are checked alike, and again when one is compiled, because an endpoint may have
changed since. `check_rules` skips rules whose endpoint is not in the mapping; `check_endpoints_exist` reports those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from graft.errors import RefusedError
from graft.model.address import IPAddress, Prefix, shown
from graft.model.endpoint import ANY_PROTOCOL, Endpoint, Protocol
from graft.model.ports import MAX_PORT, PortRange, lowest_port, ports_text
from graft.model.transport import Transport
from graft.policy.conflicts import ConflictFinder, PortClaim
from graft.policy.model import EgressRule, IngressRule, Outcome, Policy, Problem, UnixRule, Verdict

ANY4 = IPv4Address("0.0.0.0")
ANY6 = IPv6Address("::")
PORT_0 = PortRange(0, 0)
"""Of a rule for binds that leave the port to the kernel."""

LOOPBACKS = (Prefix(IPv4Network("127.0.0.0/8")), Prefix(IPv6Network("::1/128")))
"""Destinations in the container's own namespace: only a rule for a prefix inside one of them applies to it."""

UNSPECIFIED = (Prefix(IPv4Network("0.0.0.0/32")), Prefix(IPv6Network("::/128")))
"""Destinations that the kernel takes as loopback: no rule applies to them."""

MULTICAST = (Prefix(IPv4Network("224.0.0.0/4")), Prefix(IPv6Network("ff00::/8")))
NAMED_ONLY = (*MULTICAST, Prefix(IPv4Network("255.255.255.255/32")), Prefix(IPv6Network("fe80::/10")))
"""Destinations that a wider rule does not grant: many at once, and those that need an interface beside the address."""

SPECIAL_PREFIXES = (*LOOPBACKS, *UNSPECIFIED, *NAMED_ONLY)
"""Destinations to which a wider rule does not apply, or only in part."""


class IngressTarget(NamedTuple):
    """What a bind becomes: an endpoint; of a range of ports the one that is as far from its beginning as the requested
    one is from ``first_port`` (0: the endpoint is no range).
    """

    endpoint: str
    first_port: int


IngressKey = tuple[Protocol, int, IPAddress | None]
"""What a bind is looked up by, besides its port: protocol, family, and address or None for any."""


@dataclass(frozen=True, slots=True)
class IngressClaim:
    """One protocol's share of an ingress rule. Claims with equal ``key`` compete for ports."""

    rule: IngressRule
    protocol: Protocol
    family: int
    address: IPAddress | None
    target: IngressTarget

    @property
    def key(self) -> IngressKey:
        """What a bind is looked up by, besides its port."""
        return self.protocol, self.family, self.address


def ingress_claims(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[IngressClaim]:
    """The claims of each rule. A rule for any address has its endpoint's family, or both if that is a unix socket."""
    for rule in policy.ingress:
        endpoint = endpoints.get(rule.endpoint)
        if endpoint is None:
            continue
        address = rule.bind.address
        families = (4, 6) if endpoint.unix is not None else (endpoint.family,)
        target = IngressTarget(rule.endpoint, rule.bind.ports.first if endpoint.last_port else 0)
        for protocol in endpoint.protocols if rule.protocols is None else rule.protocols:
            for family in families if address is None else (address.version,):
                yield IngressClaim(rule, protocol, family, address, target)


def egress_protocols(rule: EgressRule, policy: Policy, endpoints: Mapping[str, Endpoint]) -> Protocol:
    """The protocols that ``rule`` of ``policy`` is for; its endpoint, if it has one, must be among ``endpoints``."""
    if rule.protocols is not None:
        return rule.protocols
    if rule.endpoint is not None:
        return endpoints[rule.endpoint].protocols
    has_icmp = policy.names_icmp and rule.ports is None
    return ANY_PROTOCOL | Protocol.ICMP if has_icmp else ANY_PROTOCOL


def grants_that_splice_lacks(policy: Policy, endpoints: Mapping[str, Endpoint]) -> tuple[str, ...]:
    """Fields of the rules that grant only what transport splice does not relay. ``endpoints`` has all that they name.

    It relays TCP and UDP; no ICMP.
    """
    granted: list[IngressRule | EgressRule] = [*policy.ingress, *(rule for rule in policy.egress if rule.endpoint)]
    return tuple(rule.field for rule in granted if not _relayed_protocols(rule, endpoints[str(rule.endpoint)]))


def _relayed_protocols(rule: IngressRule | EgressRule, endpoint: Endpoint) -> Protocol:
    return (rule.protocols or endpoint.protocols) & (Protocol.TCP | Protocol.UDP)


def needs_unix_relay(policy: Policy, endpoints: Mapping[str, Endpoint]) -> bool:
    """Whether a rule for TCP leads to a unix socket, so that graftd relays. ``endpoints`` has all that they name."""
    rules: tuple[IngressRule | EgressRule, ...] = (*policy.ingress, *policy.egress)
    return any(rule.endpoint is not None and endpoints[rule.endpoint].unix is not None for rule in rules)


def refuse_without_supervisor(policy: Policy, transport: Transport) -> None:
    """Raises RefusedError for a rule for a unix path, where no supervisor would bind it."""
    if policy.unix_ingress and transport is not Transport.SWAP:
        rule = policy.unix_ingress[0]
        raise RefusedError(
            f"{rule.field}: a supervisor binds a program's own unix socket, and transport {transport} has none",
            "a network namespace of its own, or the endpoint's path in the program's own configuration",
        )


def check_rules(policy: Policy, endpoints: Mapping[str, Endpoint]) -> list[Problem]:
    """Problems that no single field shows: of families, protocols, loopback, conflicts."""
    problems = [problem for rule in policy.ingress for problem in _check_ingress(rule, endpoints)]
    problems += [problem for rule in policy.egress for problem in _check_egress(rule, endpoints)]
    problems += _check_unix_rules(policy, endpoints)
    problems += _ingress_conflicts(policy, endpoints)
    problems += _egress_conflicts(policy, endpoints)
    return problems


def check_splice(policy: Policy) -> list[Problem]:
    """A problem for each rule that transport splice cannot serve as it is meant. (Groups are not relayed either; but a
    unicast datagram to such an endpoint is.)

    A program that binds port 0 is told the port that it got inside its namespace, and tells others; the host may have
    given that one to somebody else.
    """
    message = "transport splice cannot publish a bind of port 0: the program is told another port than the host's"
    hint = "name the ports, or start it with `graft run` or the OCI runtime"
    return [
        Problem(rule.line, _part(rule, "bind"), message, hint) for rule in policy.ingress if rule.bind.ports == PORT_0
    ]


def check_endpoints_exist(policy: Policy, endpoints: Mapping[str, Endpoint]) -> list[Problem]:
    """A problem for each rule whose endpoint is not among ``endpoints``."""
    rules: list[IngressRule | UnixRule | EgressRule] = [*policy.ingress, *policy.unix_ingress, *policy.egress]
    return [
        Problem(rule.line, _part(rule, "endpoint"), *endpoint_not_found(rule.endpoint))
        for rule in rules
        if rule.endpoint is not None and rule.endpoint not in endpoints
    ]


def endpoint_not_found(name: str) -> tuple[str, str]:
    """Message and hint for a rule whose endpoint does not exist."""
    return f"endpoint {shown(name)} not found", "declare it under endpoints, or add it with: graft ep add"


def _check_ingress(rule: IngressRule, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    endpoint = endpoints.get(rule.endpoint)
    if endpoint is None:
        return
    address = rule.bind.address
    if address is not None and address != ANY6 and address.version != endpoint.family and endpoint.unix is None:
        target = f"the IPv{endpoint.family} endpoint {endpoint.name}"
        message = f"an IPv{address.version} bind cannot be redirected to {target}"
        hint = (
            "an IPv4 endpoint; a bind of [::] can be redirected to this one"
            if address.version == 4
            else "an IPv6 endpoint; of IPv6 binds only [::] can be redirected to an IPv4 one"
        )
        yield Problem(rule.line, _part(rule, "endpoint"), message, hint)
    yield from _check_ports(rule, endpoint)
    yield from _check_protocols(rule, endpoint)


def _check_ports(rule: IngressRule, endpoint: Endpoint) -> Iterator[Problem]:
    """A range of an endpoint's ports is for a range of as many; the port of a bind of port 0 is the kernel's choice."""
    ports, target = rule.bind.ports, f"the endpoint {endpoint.name}"
    if ports == PORT_0:
        if endpoint.port:
            message = f"a bind of port 0 cannot be redirected to {target}, which has no dynamic port"
            hint = f"an endpoint such as {endpoint.spec_at(0)}"
            yield Problem(rule.line, _part(rule, "bind"), message, hint)
    elif endpoint.last_port and len(ports) != endpoint.port_count:
        message = f"{rule.bind} has {ports_text(len(ports))}, {target} ({endpoint.spec}) {endpoint.port_count}"
        yield Problem(rule.line, _part(rule, "bind"), message, _same_size_hint(ports, endpoint))


def _same_size_hint(ports: PortRange, endpoint: Endpoint) -> str:
    last = ports.first + endpoint.port_count - 1
    if last > MAX_PORT:
        return "as many, or an endpoint of one port"
    return f"as many, such as {PortRange(ports.first, last)}; or an endpoint of one port"


def _check_egress(rule: EgressRule, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    if rule.to in UNSPECIFIED:
        loopback = LOOPBACKS[UNSPECIFIED.index(rule.to)]
        message = f"{rule.to.network.network_address} is the container's own loopback: no rule applies to it"
        yield Problem(rule.line, _part(rule, "to"), message, f"{loopback} for loopback, /0 for everything else")
    is_icmp = rule.protocols is Protocol.ICMP
    if is_icmp and rule.ports is not None:
        yield Problem(rule.line, _part(rule, "ports"), "icmp has no ports", "leave them out, or another protocol")
    endpoint = endpoints.get(rule.endpoint) if rule.endpoint is not None else None
    if endpoint is None:
        return
    if is_icmp:
        yield from _check_icmp(rule, endpoint)
    if endpoint.unix is not None:
        if rule.to.length != rule.to.network.max_prefixlen:
            message = f"{endpoint.name} is a unix socket, which connections reach, and no source of connections"
            yield Problem(rule.line, _part(rule, "to"), message, "one address that stands for it, such as 10.0.0.5")
    elif rule.to.family != endpoint.family:
        wanted = f"IPv{rule.to.family}"
        message = f"{wanted} destinations cannot be reached from the IPv{endpoint.family} endpoint {endpoint.name}"
        yield Problem(rule.line, _part(rule, "endpoint"), message, f"an {wanted} endpoint")
    if not is_icmp:
        yield from _check_protocols(rule, endpoint)


def _check_icmp(rule: EgressRule, endpoint: Endpoint) -> Iterator[Problem]:
    """ICMP takes an endpoint's address alone."""
    if endpoint.port or endpoint.protocols != ANY_PROTOCOL:
        what = "has a port" if endpoint.port else f"is for {endpoint.protocols.label} only"
        message = f"the rule is for icmp, its endpoint {endpoint.name} {what}"
        hint = f"an endpoint for any protocol, such as {endpoint.spec_at(0)}"
        yield Problem(rule.line, _part(rule, "endpoint"), message, hint)


def _check_unix_rules(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    seen: dict[str, UnixRule] = {}
    for rule in policy.unix_ingress:
        endpoint = endpoints.get(rule.endpoint)
        if endpoint is None:
            continue
        if endpoint.unix is None:
            message = f"a bind of a unix socket cannot be redirected to {endpoint.spec}"
            yield Problem(rule.line, _part(rule, "endpoint"), message, "an endpoint at unix:/PATH")
        other = seen.setdefault(rule.path, rule)
        if other.endpoint != rule.endpoint:
            theirs = f"{_location(other)} redirects it to {other.endpoint}"
            message = f"unix:{rule.path} is redirected to {rule.endpoint}, but {theirs}"
            yield Problem(rule.line, _part(rule, "bind"), message, "one rule for a path")


def _check_protocols(rule: IngressRule | EgressRule, endpoint: Endpoint) -> Iterator[Problem]:
    if rule.protocols is not None and rule.protocols & ~endpoint.protocols:
        message = f"the rule is for {rule.protocols.label}, its endpoint {endpoint.name} for {endpoint.protocols.label}"
        yield Problem(rule.line, _part(rule, "protocol"), message, f"{endpoint.protocols.label}, or leave it out")


def _ingress_conflicts(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    finders: dict[IngressKey, ConflictFinder[IngressRule]] = {}
    reported: set[int] = set()
    for claim in ingress_claims(policy, endpoints):
        rule = claim.rule
        finder = finders.setdefault(claim.key, ConflictFinder())
        other = finder.add(PortClaim(rule.bind.ports, claim.target, rule))
        if other is not None and id(rule) not in reported:
            reported.add(id(rule))
            message = (
                f"{rule.bind} is redirected to {rule.endpoint} for {claim.protocol.label}, but {_location(other)}"
                f" redirects {other.bind} to {other.endpoint}"
            )
            hint = "disjoint port ranges, or one inside the other: the smaller one wins"
            yield Problem(rule.line, _part(rule, "bind"), message, hint)


class _PortOutcomes:
    """The outcomes at each port of one destination so far, as sets of ports (graft/model/ports.py)."""

    def __init__(self) -> None:
        self._rules: list[tuple[EgressRule, Outcome, int]] = []
        self._by_outcome: dict[Outcome, int] = {}
        self._with_any = self._with_several = 0  # ports with an outcome, and with more than one

    def add(self, rule: EgressRule) -> tuple[EgressRule, int] | None:
        """Add ``rule``. Gives the first one with another outcome at some of its ports, and those ports."""
        outcome, mask = rule.outcome, rule.port_mask
        own = self._by_outcome.get(outcome, 0)
        has_conflict = mask & (self._with_any & ~own | self._with_several)
        found = self._first_conflict(outcome, mask) if has_conflict else None
        self._rules.append((rule, outcome, mask))
        new = mask & ~own
        self._with_several |= self._with_any & new
        self._with_any |= new
        self._by_outcome[outcome] = own | mask
        return found

    def _first_conflict(self, outcome: Outcome, mask: int) -> tuple[EgressRule, int] | None:
        for rule, other, ports in self._rules:
            if other != outcome and mask & ports:
                return rule, mask & ports
        return None


def _egress_conflicts(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    earlier: dict[tuple[Protocol, Prefix], _PortOutcomes] = {}
    reported: set[int] = set()
    for rule in policy.egress:
        if rule.endpoint is not None and rule.endpoint not in endpoints:
            continue
        for protocol in egress_protocols(rule, policy, endpoints):
            found = earlier.setdefault((protocol, rule.to), _PortOutcomes()).add(rule)
            if found is not None and id(rule) not in reported:
                reported.add(id(rule))
                yield _egress_conflict(rule, *found, protocol)


def _egress_conflict(rule: EgressRule, other: EgressRule, shared: int, protocol: Protocol) -> Problem:
    ports = f"port {lowest_port(shared)} of" if rule.ports or other.ports else "every port of"
    mine, theirs = _format_outcome(rule), _format_outcome(other)
    message = f"{ports} {rule.to} has {mine} for {protocol.label}, but {theirs} in {_location(other)}"
    hint = "disjoint ports, or a longer prefix: the longer one wins"
    return Problem(rule.line, _part(rule, "to"), message, hint)


def _format_outcome(rule: EgressRule) -> str:
    return f"endpoint {rule.endpoint}" if rule.verdict is Verdict.GRANT else f"action {rule.verdict.name.lower()}"


def _location(rule: IngressRule | UnixRule | EgressRule) -> str:
    return rule.field if rule.line is None else f"{rule.field} (line {rule.line})"


def _part(rule: IngressRule | UnixRule | EgressRule, key: str) -> str:
    """The field ``key`` of ``rule``. A rule that comes from a flag has no fields of its own."""
    return rule.field if rule.line is None else f"{rule.field}.{key}"
