"""From a policy and its endpoints to map entries: pure data, nothing here touches the kernel.

Ingress. For each protocol and each (family, address or any) the rules are laid out port by port, the smallest
range on top, so that the entries of one address never overlap. The kernel asks for the exact address first,
then for "any". What no IPv6 rule grants to [::] gets what a bind of 0.0.0.0 gets: a program that binds a
dual-stack [::]:80 is served by an IPv4 endpoint, as a v4-mapped address.

Egress. The kernel takes the longest prefix that holds the destination, and under its node the port. It does
not come back to a shorter prefix, so every node lists all its ports: its own rules', and for the other ports
those of the nearest shorter prefix. Loopback destinations stay the container's: where a wider rule would cover
them, they get a prefix of their own with an empty node. Link-local ones and IPv6 multicast get one too, with all but
the grants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from itertools import islice
from operator import or_
from typing import TypeVar

from graft.errors import UsageError
from graft.model.address import IPAddress, Prefix, pack16
from graft.model.endpoint import IP_PROTOCOLS, Endpoint, Protocol
from graft.model.ports import prefixes_of
from graft.policy.limits import MAX_ENTRIES, check_size
from graft.policy.model import Default, Policy, PolicyError, Verdict
from graft.policy.validator import (
    ANY4,
    ANY6,
    GUARDS,
    LINK_LOCAL,
    LOOPBACKS,
    UNSPECIFIED,
    IngressClaim,
    check_endpoints_exist,
    check_rules,
    egress_protocols,
    ingress_claims,
)

__all__ = [
    "Default",
    "EgressPortEntry",
    "EgressPrefixEntry",
    "IngressEntry",
    "RuleSet",
    "Verdict",
    "compile_policy",
]


@dataclass(frozen=True, slots=True)
class IngressEntry:
    """(protocol, family, address, leading ``port_bits`` of port) -> endpoint. ``address`` None is "any"."""

    protocol: int
    family: int
    address: bytes | None
    port: int
    port_bits: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class EgressPrefixEntry:
    """(protocol, family, leading ``prefix_len`` bits of address) -> node."""

    protocol: int
    family: int
    address: bytes
    prefix_len: int
    node: int


@dataclass(frozen=True, slots=True)
class EgressPortEntry:
    """(node, leading ``port_bits`` of port) -> verdict, with the source endpoint of a GRANT."""

    node: int
    port: int
    port_bits: int
    verdict: Verdict
    endpoint: str | None


@dataclass(frozen=True, slots=True)
class RuleSet:
    """A whole policy as map entries. Nodes are numbered from 1; a node may have no ports at all.

    ``denies``: some rule denies, whatever the defaults are. ``leaves_others``: sockets that no rule can speak of are
    left alone.
    """

    ingress: tuple[IngressEntry, ...]
    egress_prefixes: tuple[EgressPrefixEntry, ...]
    egress_ports: tuple[EgressPortEntry, ...]
    bind_default: Default
    connect_default: Default
    denies: bool = False
    leaves_others: bool = False

    @property
    def entries(self) -> int:
        """How many map entries it takes."""
        return len(self.ingress) + len(self.egress_prefixes) + len(self.egress_ports)


Outcome = tuple[Verdict, str | None]
Key = TypeVar("Key")
PortClaims = dict[Key, int]
"""Who or what has which ports: sets of ports (graft/model/ports.py) that are disjoint."""
Claimed = tuple[Protocol, int, IPAddress | None]
"""What ingress entries are looked up by, besides the port: protocol, family, address or any."""
Entry = TypeVar("Entry", bound=IngressEntry | EgressPrefixEntry | EgressPortEntry)


def compile_policy(policy: Policy, endpoints: Mapping[str, Endpoint]) -> RuleSet:
    """The entries of ``policy``; ``endpoints`` are those it may name besides the ones it declares.

    Raises PolicyError where a rule's endpoint is missing or does not fit it, or where rules are in
    conflict (no entry is made of such a policy), and UsageError where it is too big (graft/policy/limits.py).
    """
    check_size(policy)
    resolved = policy.resolve(endpoints)
    problems = check_endpoints_exist(policy, resolved) + check_rules(policy, resolved)
    if problems:
        raise PolicyError(policy.name, problems)
    ingress = _at_most(MAX_ENTRIES, _ingress_entries(policy, resolved))
    egress = _at_most(MAX_ENTRIES - len(ingress), _egress_entries(policy, resolved))
    return RuleSet(
        ingress=tuple(ingress),
        egress_prefixes=tuple(entry for entry in egress if isinstance(entry, EgressPrefixEntry)),
        egress_ports=tuple(entry for entry in egress if isinstance(entry, EgressPortEntry)),
        bind_default=policy.bind_default,
        connect_default=policy.connect_default,
        denies=policy.other_default is Default.DENY or any(rule.verdict is Verdict.DENY for rule in policy.egress),
        leaves_others=policy.other_default is Default.CONTAINER,
    )


def _at_most(limit: int, entries: Iterator[Entry]) -> list[Entry]:
    """All of ``entries``; stops making them where they are too many."""
    kept = list(islice(entries, limit + 1))
    if len(kept) > limit:
        raise UsageError(f"policy: it takes more than {MAX_ENTRIES} map entries", "fewer rules, prefixes or ports")
    return kept


def _fill(top: PortClaims[Key], under: PortClaims[Key]) -> PortClaims[Key]:
    """``top``, and for the ports that it leaves free, ``under``."""
    taken = _union(top)
    filled = dict(top)
    for key, mask in under.items():
        if free := mask & ~taken:
            filled[key] = filled.get(key, 0) | free
    return filled


def _union(layout: PortClaims[Key]) -> int:
    return reduce(or_, layout.values(), 0)


def _ingress_entries(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[IngressEntry]:
    claims: dict[Claimed, list[IngressClaim]] = defaultdict(list)
    for claim in ingress_claims(policy, endpoints):
        claims[claim.key].append(claim)
    layouts = {key: _smallest_first(competing) for key, competing in claims.items()}
    for protocol in IP_PROTOCOLS:
        _serve_dual_stack(layouts, protocol)
    prefixes = cache(lambda mask: tuple(prefixes_of(mask)))  # TCP and UDP, 0.0.0.0 and [::] mostly have the same ports
    for (protocol, family, address), layout in layouts.items():
        packed = None if address is None else pack16(address)
        for endpoint, mask in layout.items():
            for port, bits in prefixes(mask):
                yield IngressEntry(IP_PROTOCOLS[protocol], family, packed, port, bits, endpoint)


def _smallest_first(claims: Iterable[IngressClaim]) -> PortClaims[str]:
    """Endpoint -> ports: each port goes to the smallest range that holds it."""
    layout: PortClaims[str] = {}
    taken = 0
    for claim in sorted(claims, key=lambda claim: len(claim.rule.bind.ports)):
        mask = claim.rule.bind.ports.mask
        if free := mask & ~taken:
            layout[claim.rule.endpoint] = layout.get(claim.rule.endpoint, 0) | free
        taken |= mask
    return layout


def _serve_dual_stack(layouts: dict[Claimed, PortClaims[str]], protocol: Protocol) -> None:
    """Give [::] what 0.0.0.0 has, at the ports where no IPv6 rule, exact or any, speaks of [::]."""
    ipv4 = _fill(layouts.get((protocol, 4, ANY4), {}), layouts.get((protocol, 4, None), {}))
    exact = layouts.get((protocol, 6, ANY6), {})
    granted = _union(exact) | _union(layouts.get((protocol, 6, None), {}))
    derived = {endpoint: mask & ~granted for endpoint, mask in ipv4.items() if mask & ~granted}
    if derived:
        layouts[protocol, 6, ANY6] = _fill(exact, derived)


def _egress_entries(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[EgressPrefixEntry | EgressPortEntry]:
    """Prefixes, and before the first prefix of a node the node's ports. Equal layouts share a node."""
    nodes: dict[frozenset[tuple[Outcome, int]], int] = {}
    for protocol, prefix, layout in _egress_layouts(policy, endpoints):
        content = frozenset(layout.items())
        if content not in nodes:
            nodes[content] = len(nodes) + 1
            for (verdict, endpoint), mask in layout.items():
                for port, bits in prefixes_of(mask):
                    yield EgressPortEntry(nodes[content], port, bits, verdict, endpoint)
        node = nodes[content]
        yield EgressPrefixEntry(IP_PROTOCOLS[protocol], prefix.family, prefix.packed16, prefix.length, node)


def _egress_layouts(
    policy: Policy, endpoints: Mapping[str, Endpoint]
) -> Iterator[tuple[Protocol, Prefix, PortClaims[Outcome]]]:
    """Each prefix with all that is to be said of its ports, its own rules' and inherited."""
    for (protocol, _family), own in _own_layouts(policy, endpoints).items():
        complete: dict[Prefix, PortClaims[Outcome]] = {}
        without_grants: dict[Prefix, PortClaims[Outcome]] = {}
        lengths = sorted({prefix.length for prefix in own}, reverse=True)
        for prefix in sorted(own, key=lambda prefix: prefix.length):
            parent = _parent(prefix, complete, lengths)
            inherits = without_grants if _enters_link_local(prefix, parent) else complete
            complete[prefix] = own[prefix] if parent is None else _fill(own[prefix], inherits[parent])
            plain = _without_grants(own[prefix])
            without_grants[prefix] = plain if parent is None else _fill(plain, without_grants[parent])
            yield protocol, prefix, complete[prefix]


def _without_grants(layout: PortClaims[Outcome]) -> PortClaims[Outcome]:
    return {outcome: mask for outcome, mask in layout.items() if outcome[0] is not Verdict.GRANT}


def _enters_link_local(prefix: Prefix, parent: Prefix | None) -> bool:
    """Whether a link-local prefix would inherit from one that is wider than that."""
    return any(prefix.inside(guard) and parent is not None and not parent.inside(guard) for guard in LINK_LOCAL)


def _own_layouts(
    policy: Policy, endpoints: Mapping[str, Endpoint]
) -> dict[tuple[Protocol, int], dict[Prefix, PortClaims[Outcome]]]:
    """For each protocol and family: prefix -> what its own rules say, and the guards."""
    tries: dict[tuple[Protocol, int], dict[Prefix, PortClaims[Outcome]]] = defaultdict(dict)
    for rule in policy.egress:
        mask = rule.port_mask
        for protocol in egress_protocols(rule, endpoints):
            layout = tries[protocol, rule.to.family].setdefault(rule.to, {})
            outcome = (rule.verdict, rule.endpoint)
            layout[outcome] = layout.get(outcome, 0) | mask
    for own in tries.values():
        for guard in GUARDS:
            if guard not in own and any(guard.inside(prefix) for prefix in own):
                own[guard] = {}
    return tries


def _parent(prefix: Prefix, complete: Mapping[Prefix, object], lengths: Iterable[int]) -> Prefix | None:
    """The longest of ``complete`` that holds ``prefix``; for one in loopback, only if it is in loopback too."""
    guard = next((guard for guard in (*LOOPBACKS, *UNSPECIFIED) if prefix.inside(guard)), None)
    shortest = 0 if guard is None else guard.length
    for length in lengths:
        if shortest <= length < prefix.length:
            wider = Prefix(prefix.network.supernet(new_prefix=length))
            if wider in complete:
                return wider
    return None
