"""Do the rules of a policy fit their endpoints, and each other?

Asked of policies from files and from flags alike, and again when one is compiled, because an endpoint may
have changed since. `check_rules` passes over rules whose endpoint is not in the mapping;
`check_endpoints_exist` is about those.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from graft.model.address import IPAddress, Prefix, shown
from graft.model.endpoint import ANY_PROTOCOL, Endpoint, Protocol
from graft.model.ports import lowest_port
from graft.policy.conflicts import Claim, Rivals
from graft.policy.model import EgressRule, IngressRule, Policy, Problem, Verdict

ANY4 = IPv4Address("0.0.0.0")
ANY6 = IPv6Address("::")

LOOPBACKS = (Prefix(IPv4Network("127.0.0.0/8")), Prefix(IPv6Network("::1/128")))
"""Destinations inside the container's own machine; only a rule inside one of them speaks of it."""

UNSPECIFIED = (Prefix(IPv4Network("0.0.0.0/32")), Prefix(IPv6Network("::/128")))
"""Destinations that the kernel takes as loopback, so that no rule ever speaks of them."""

LINK_LOCAL = (Prefix(IPv6Network("fe80::/10")), Prefix(IPv6Network("ff00::/8")))
"""Destinations that are told apart by an interface, which no rule names (of multicast, those of a link): a wider rule
does not grant them."""

GUARDS = (*LOOPBACKS, *UNSPECIFIED, *LINK_LOCAL)
"""Destinations of which a wider rule does not, or not all, hold."""


@dataclass(frozen=True, slots=True)
class IngressClaim:
    """One protocol's share of an ingress rule. Claims with equal ``key`` compete for ports."""

    rule: IngressRule
    protocol: Protocol
    family: int
    address: IPAddress | None

    @property
    def key(self) -> tuple[Protocol, int, IPAddress | None]:
        """What a bind is looked up by, besides its port."""
        return self.protocol, self.family, self.address


def ingress_claims(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[IngressClaim]:
    """What each rule lays claim to. An "any" rule is of the family of its endpoint."""
    for rule in policy.ingress:
        endpoint = endpoints.get(rule.endpoint)
        if endpoint is None:
            continue
        address = rule.bind.address
        family = endpoint.family if address is None else address.version
        for protocol in endpoint.protocols if rule.protocols is None else rule.protocols:
            yield IngressClaim(rule, protocol, family, address)


def egress_protocols(rule: EgressRule, endpoints: Mapping[str, Endpoint]) -> Protocol:
    """The protocols that ``rule`` holds for; its endpoint, if it has one, must be among ``endpoints``."""
    if rule.protocols is not None:
        return rule.protocols
    return ANY_PROTOCOL if rule.endpoint is None else endpoints[rule.endpoint].protocols


def grants_without_tcp(policy: Policy, endpoints: Mapping[str, Endpoint]) -> tuple[str, ...]:
    """Fields of the rules that grant something, and nothing for TCP. ``endpoints`` has all that they name."""
    granted: list[IngressRule | EgressRule] = [*policy.ingress, *(rule for rule in policy.egress if rule.endpoint)]
    return tuple(
        rule.field for rule in granted if not (rule.protocols or endpoints[str(rule.endpoint)].protocols) & Protocol.TCP
    )


def check_rules(policy: Policy, endpoints: Mapping[str, Endpoint]) -> list[Problem]:
    """Everything about the rules that no single field shows: families, protocols, loopback, conflicts."""
    problems = [problem for rule in policy.ingress for problem in _check_ingress(rule, endpoints)]
    problems += [problem for rule in policy.egress for problem in _check_egress(rule, endpoints)]
    problems += _ingress_conflicts(policy, endpoints)
    problems += _egress_conflicts(policy, endpoints)
    return problems


def check_endpoints_exist(policy: Policy, endpoints: Mapping[str, Endpoint]) -> list[Problem]:
    """A problem for each rule whose endpoint is not among ``endpoints``."""
    rules: list[IngressRule | EgressRule] = [*policy.ingress, *policy.egress]
    return [
        Problem(rule.line, _part(rule, "endpoint"), *no_endpoint(rule.endpoint))
        for rule in rules
        if rule.endpoint is not None and rule.endpoint not in endpoints
    ]


def no_endpoint(name: str) -> tuple[str, str]:
    """Message and hint for a rule that names an endpoint which is not there."""
    return f"there is no endpoint {shown(name)}", "declare it under endpoints, or add it with: graft ep add"


def _check_ingress(rule: IngressRule, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    endpoint = endpoints.get(rule.endpoint)
    if endpoint is None:
        return
    address = rule.bind.address
    if address is not None and address != ANY6 and address.version != endpoint.family:
        message = f"an IPv{address.version} bind cannot become the IPv{endpoint.family} endpoint {endpoint.name}"
        hint = (
            "an IPv4 endpoint; a program that binds [::] can have this one"
            if address.version == 4
            else "an IPv6 endpoint; of IPv6 binds only [::] can become an IPv4 one"
        )
        yield Problem(rule.line, _part(rule, "endpoint"), message, hint)
    yield from _check_protocols(rule, endpoint)


def _check_egress(rule: EgressRule, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    if rule.to in UNSPECIFIED:
        loopback = LOOPBACKS[UNSPECIFIED.index(rule.to)]
        message = f"{rule.to.network.network_address} is the container's own loopback, no rule speaks of it"
        yield Problem(rule.line, _part(rule, "to"), message, f"{loopback} for loopback, /0 for everything else")
    endpoint = endpoints.get(rule.endpoint) if rule.endpoint is not None else None
    if endpoint is None:
        return
    if rule.to.family != endpoint.family:
        wanted = f"IPv{rule.to.family}"
        message = f"{wanted} destinations cannot be reached from the IPv{endpoint.family} endpoint {endpoint.name}"
        yield Problem(rule.line, _part(rule, "endpoint"), message, f"an {wanted} endpoint")
    yield from _check_protocols(rule, endpoint)


def _check_protocols(rule: IngressRule | EgressRule, endpoint: Endpoint) -> Iterator[Problem]:
    if rule.protocols is not None and rule.protocols & ~endpoint.protocols:
        message = f"the rule is for {rule.protocols.label}, its endpoint {endpoint.name} for {endpoint.protocols.label}"
        yield Problem(rule.line, _part(rule, "protocol"), message, f"{endpoint.protocols.label}, or leave it out")


def _ingress_conflicts(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    earlier: dict[Hashable, Rivals[IngressRule]] = {}
    accused: set[int] = set()
    for claim in ingress_claims(policy, endpoints):
        rule = claim.rule
        rivals = earlier.setdefault(claim.key, Rivals())
        other = rivals.add(Claim(rule.bind.ports, rule.endpoint, rule))
        if other is not None and id(rule) not in accused:
            accused.add(id(rule))
            message = (
                f"{rule.bind} becomes {rule.endpoint} for {claim.protocol.label}, but {_where(other)} makes"
                f" {other.endpoint} of {other.bind}"
            )
            hint = "port ranges that are apart, or one inside the other: the smaller one wins"
            yield Problem(rule.line, _part(rule, "bind"), message, hint)


class _Outcomes:
    """What the rules for one destination say of its ports, so far, as sets of ports (graft/model/ports.py)."""

    def __init__(self) -> None:
        self._rules: list[tuple[EgressRule, int]] = []
        self._by_outcome: dict[Hashable, int] = {}
        self._once = self._twice = 0  # ports with an outcome, and with more than one

    def add(self, rule: EgressRule) -> tuple[EgressRule, int] | None:
        """Take ``rule`` in. Gives the first one with another outcome for some of its ports, and those ports."""
        mask, outcome = rule.port_mask, (rule.verdict, rule.endpoint)
        own = self._by_outcome.get(outcome, 0)
        contested = mask & (self._once & ~own | self._twice)
        found = self._first_other(rule, mask) if contested else None
        self._rules.append((rule, mask))
        new = mask & ~own
        self._twice |= self._once & new
        self._once |= new
        self._by_outcome[outcome] = own | mask
        return found

    def _first_other(self, rule: EgressRule, mask: int) -> tuple[EgressRule, int] | None:
        meeting = ((other, mask & ports) for other, ports in self._rules if _differ(rule, other))
        return next(((other, shared) for other, shared in meeting if shared), None)


def _egress_conflicts(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[Problem]:
    earlier: dict[Hashable, _Outcomes] = {}
    accused: set[int] = set()
    for rule in policy.egress:
        if rule.endpoint is not None and rule.endpoint not in endpoints:
            continue
        for protocol in egress_protocols(rule, endpoints):
            found = earlier.setdefault((protocol, rule.to), _Outcomes()).add(rule)
            if found is not None and id(rule) not in accused:
                accused.add(id(rule))
                yield _egress_conflict(rule, *found, protocol)


def _differ(one: EgressRule, other: EgressRule) -> bool:
    return (one.verdict, one.endpoint) != (other.verdict, other.endpoint)


def _egress_conflict(rule: EgressRule, other: EgressRule, shared: int, protocol: Protocol) -> Problem:
    where = f"port {lowest_port(shared)} of" if rule.ports or other.ports else "every port of"
    message = f"{where} {rule.to} has {_outcome(rule)} for {protocol.label}, but {_where(other)} says {_outcome(other)}"
    hint = "ports that are apart, or a longer prefix: the longer one wins"
    return Problem(rule.line, _part(rule, "to"), message, hint)


def _outcome(rule: EgressRule) -> str:
    return f"endpoint {rule.endpoint}" if rule.verdict is Verdict.GRANT else f"action {rule.verdict.name.lower()}"


def _where(rule: IngressRule | EgressRule) -> str:
    return rule.field if rule.line is None else f"{rule.field} (line {rule.line})"


def _part(rule: IngressRule | EgressRule, key: str) -> str:
    """The field of ``rule`` that ``key`` names; a flag, or a pair, has no parts."""
    return rule.field if rule.line is None else f"{rule.field}.{key}"
