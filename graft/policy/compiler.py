"""From a policy and its endpoints to map entries: pure data, nothing here touches the kernel.

Ingress. For each protocol and each (family, address or any) the rules are laid out port by port, the smallest
range on top, so that the entries of one address never overlap. The hooks look up the exact address first, then "any".
At ports where no IPv6 rule applies to [::], a bind of [::] gets what a bind of 0.0.0.0 gets: a program that binds a
dual-stack [::]:80 is served by an IPv4 endpoint, as a v4-mapped address.

Egress. The hooks look up the longest prefix that contains the destination, and then the port in that prefix's node.
They do not fall back to a shorter prefix, so every node lists all ports: those of its own rules, and for the others
the outcomes of the nearest shorter prefix. Loopback destinations stay the container's: where a wider rule would cover
them, they get a prefix of their own with an empty node. Link-local ones, multicast and broadcast get one too, with
everything but the grants.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from itertools import chain, islice
from operator import or_
from typing import TypeVar

from graft.errors import UsageError
from graft.model.address import IPAddress, Prefix, pack16
from graft.model.endpoint import IP_PROTOCOLS, Endpoint, Protocol, in_order
from graft.model.ports import prefixes_of
from graft.model.unix_socket import UNIX_FAMILY, path_key
from graft.policy.limits import GROUP_ENTRIES, check_size, max_entries
from graft.policy.model import Default, Outcome, Policy, PolicyError, Verdict
from graft.policy.validator import (
    ANY4,
    ANY6,
    LOOPBACKS,
    MULTICAST,
    NAMED_ONLY,
    SPECIAL_PREFIXES,
    UNSPECIFIED,
    IngressClaim,
    IngressKey,
    IngressTarget,
    check_endpoints_exist,
    check_rules,
    egress_protocols,
    ingress_claims,
)

T = TypeVar("T")
Owner = TypeVar("Owner")
PortLayout = dict[Owner, int]
"""Which ports each owner (what a bind becomes, or an outcome) has: disjoint sets of ports (graft/model/ports.py)."""


@dataclass(frozen=True, slots=True)
class IngressEntry:
    """(protocol, family, address, leading ``port_bits`` of port) -> endpoint. ``address`` None means any.

    ``first_port``: of the rule's range, where the endpoint is a range of as many ports; else 0.
    A rule for the path of a unix socket has UNIX_FAMILY, the path's key for an address, and port 0.
    """

    protocol: int
    family: int
    address: bytes | None
    port: int
    port_bits: int
    endpoint: str
    first_port: int = 0


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
    """(node, leading ``port_bits`` of port) -> verdict, with the source endpoint of a GRANT. ``is_named``: its rule
    is for one IPv4 address.
    """

    node: int
    port: int
    port_bits: int
    verdict: Verdict
    endpoint: str | None
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class RuleSet:
    """A whole policy as map entries. Nodes are numbered from 1; a node may have no ports at all.

    ``denies``: some rule denies, whatever the defaults are. ``leaves_others``: sockets that no rule can match are left
    alone. ``names_icmp``: the rules judge sockets that ping. ``names_groups``: there are multicast groups
    that a socket may join or send to. ``groups``: those that it may join, at one of the endpoints that have them.
    """

    ingress: tuple[IngressEntry, ...]
    egress_prefixes: tuple[EgressPrefixEntry, ...]
    egress_ports: tuple[EgressPortEntry, ...]
    bind_default: Default
    connect_default: Default
    denies: bool = False
    leaves_others: bool = False
    names_icmp: bool = False
    names_groups: bool = False
    groups: tuple[IPAddress, ...] = ()

    @property
    def entries(self) -> int:
        """How many map entries it takes."""
        return len(self.ingress) + len(self.egress_prefixes) + len(self.egress_ports) + len(self.groups)

    @property
    def weight(self) -> int:
        """The same, where each counts by how small its map is."""
        return self.entries + (GROUP_ENTRIES - 1) * len(self.groups)


def compile_policy(policy: Policy, endpoints: Mapping[str, Endpoint]) -> RuleSet:
    """The entries of ``policy``; ``endpoints`` are those it may name besides the ones it declares.

    Raises PolicyError where a rule's endpoint is missing or does not fit it, or where rules are in conflict, and
    UsageError where the policy is too big (graft/policy/limits.py).
    """
    check_size(policy)
    resolved = policy.resolve(endpoints)
    problems = check_endpoints_exist(policy, resolved) + check_rules(policy, resolved)
    if problems:
        raise PolicyError(policy.name, problems)
    limit = max_entries(policy)
    ingress = _at_most(limit, limit, chain(_ingress_entries(policy, resolved), _unix_entries(policy)))
    egress = _at_most(limit - len(ingress), limit, _egress_entries(policy, resolved))
    groups = in_order(group for rule in policy.ingress for group in resolved[rule.endpoint].multicast)
    return RuleSet(
        ingress=tuple(ingress),
        egress_prefixes=tuple(entry for entry in egress if isinstance(entry, EgressPrefixEntry)),
        egress_ports=tuple(entry for entry in egress if isinstance(entry, EgressPortEntry)),
        bind_default=policy.bind_default,
        connect_default=policy.connect_default,
        denies=policy.other_default is Default.DENY or any(rule.verdict is Verdict.DENY for rule in policy.egress),
        leaves_others=policy.other_default is Default.CONTAINER,
        names_icmp=policy.names_icmp,
        names_groups=bool(groups) or _sends_to_groups(policy),
        groups=groups,
    )


def _sends_to_groups(policy: Policy) -> bool:
    """Whether a rule grants multicast groups as destinations."""
    grants = (rule.to for rule in policy.egress if rule.verdict is Verdict.GRANT)
    return any(to.inside(groups) for to in grants for groups in MULTICAST)


def _at_most(count: int, limit: int, entries: Iterator[T]) -> list[T]:
    """All of ``entries``. Raises UsageError, naming ``limit``, as soon as there are more than ``count``."""
    kept = list(islice(entries, count + 1))
    if len(kept) > count:
        raise UsageError(f"policy: it needs more than {limit} map entries", "fewer rules, prefixes or ports")
    return kept


def _overlay(top: PortLayout[Owner], bottom: PortLayout[Owner]) -> PortLayout[Owner]:
    """``top``, and ``bottom`` at the ports that ``top`` leaves free."""
    taken = _union(top)
    layout = dict(top)
    for owner, mask in bottom.items():
        if free := mask & ~taken:
            layout[owner] = layout.get(owner, 0) | free
    return layout


def _union(layout: PortLayout[Owner]) -> int:
    return reduce(or_, layout.values(), 0)


def _ingress_entries(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[IngressEntry]:
    claims: dict[IngressKey, list[IngressClaim]] = defaultdict(list)
    for claim in ingress_claims(policy, endpoints):
        claims[claim.key].append(claim)
    layouts = {key: _smallest_first(competing) for key, competing in claims.items()}
    for protocol in IP_PROTOCOLS:
        _serve_dual_stack(layouts, protocol)
    prefixes = cache(lambda mask: tuple(prefixes_of(mask)))  # TCP and UDP, 0.0.0.0 and [::] mostly have the same ports
    for (protocol, family, address), layout in layouts.items():
        packed = None if address is None else pack16(address)
        for target, mask in layout.items():
            for port, bits in prefixes(mask):
                yield IngressEntry(IP_PROTOCOLS[protocol], family, packed, port, bits, *target)


def _unix_entries(policy: Policy) -> Iterator[IngressEntry]:
    for path, endpoint in {rule.path: rule.endpoint for rule in policy.unix_ingress}.items():
        yield IngressEntry(IP_PROTOCOLS[Protocol.TCP], UNIX_FAMILY, path_key(os.fsencode(path)), 0, 16, endpoint)


def _smallest_first(claims: Iterable[IngressClaim]) -> PortLayout[IngressTarget]:
    """Target -> ports: each port goes to the smallest range that contains it."""
    layout: PortLayout[IngressTarget] = {}
    taken = 0
    for claim in sorted(claims, key=lambda claim: len(claim.rule.bind.ports)):
        mask = claim.rule.bind.ports.mask
        if free := mask & ~taken:
            layout[claim.target] = layout.get(claim.target, 0) | free
        taken |= mask
    return layout


def _serve_dual_stack(layouts: dict[IngressKey, PortLayout[IngressTarget]], protocol: Protocol) -> None:
    """Give [::] what 0.0.0.0 has, at the ports where no IPv6 rule, exact or any, applies to [::]."""
    ipv4 = _overlay(layouts.get((protocol, 4, ANY4), {}), layouts.get((protocol, 4, None), {}))
    exact = layouts.get((protocol, 6, ANY6), {})
    granted = _union(exact) | _union(layouts.get((protocol, 6, None), {}))
    derived = {target: mask & ~granted for target, mask in ipv4.items() if mask & ~granted}
    if derived:
        layouts[protocol, 6, ANY6] = _overlay(exact, derived)


def _egress_entries(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[EgressPrefixEntry | EgressPortEntry]:
    """Prefixes, and before the first prefix of a node the ports of that node. Equal layouts share a node."""
    nodes: dict[frozenset[tuple[Outcome, int]], int] = {}
    for protocol, prefix, layout in _egress_layouts(policy, endpoints):
        content = frozenset(layout.items())
        if content not in nodes:
            nodes[content] = len(nodes) + 1
            for outcome, mask in layout.items():
                for port, bits in prefixes_of(mask):
                    yield EgressPortEntry(nodes[content], port, bits, *outcome)
        node = nodes[content]
        yield EgressPrefixEntry(IP_PROTOCOLS[protocol], prefix.family, prefix.packed16, prefix.length, node)


def _egress_layouts(
    policy: Policy, endpoints: Mapping[str, Endpoint]
) -> Iterator[tuple[Protocol, Prefix, PortLayout[Outcome]]]:
    """Each prefix with the outcomes at all its ports: those of its own rules, and inherited ones."""
    for (protocol, _family), own in _own_layouts(policy, endpoints).items():
        complete: dict[Prefix, PortLayout[Outcome]] = {}
        without_grants: dict[Prefix, PortLayout[Outcome]] = {}
        lengths = sorted({prefix.length for prefix in own}, reverse=True)
        for prefix in sorted(own, key=lambda prefix: prefix.length):
            parent = _parent(prefix, complete, lengths)
            inherits = without_grants if _enters_named_only(prefix, parent) else complete
            complete[prefix] = own[prefix] if parent is None else _overlay(own[prefix], inherits[parent])
            own_without = _without_grants(own[prefix])
            without_grants[prefix] = own_without if parent is None else _overlay(own_without, without_grants[parent])
            yield protocol, prefix, complete[prefix]


def _without_grants(layout: PortLayout[Outcome]) -> PortLayout[Outcome]:
    return {outcome: mask for outcome, mask in layout.items() if outcome.verdict is not Verdict.GRANT}


def _enters_named_only(prefix: Prefix, parent: Prefix | None) -> bool:
    """Whether ``prefix`` has destinations to be granted by name only, and ``parent`` others too."""
    return parent is not None and any(prefix.inside(named) and not parent.inside(named) for named in NAMED_ONLY)


def _own_layouts(
    policy: Policy, endpoints: Mapping[str, Endpoint]
) -> dict[tuple[Protocol, int], dict[Prefix, PortLayout[Outcome]]]:
    """For each protocol and family: prefix -> outcomes of its own rules. Special prefixes inside one are there too."""
    layouts: dict[tuple[Protocol, int], dict[Prefix, PortLayout[Outcome]]] = defaultdict(dict)
    for rule in policy.egress:
        mask = rule.port_mask
        for protocol in egress_protocols(rule, policy, endpoints):
            layout = layouts[protocol, rule.to.family].setdefault(rule.to, {})
            layout[rule.outcome] = layout.get(rule.outcome, 0) | mask
    for own in layouts.values():
        for special in SPECIAL_PREFIXES:
            if special not in own and any(special.inside(prefix) for prefix in own):
                own[special] = {}
    return layouts


def _parent(prefix: Prefix, complete: Mapping[Prefix, object], lengths: Iterable[int]) -> Prefix | None:
    """The longest of ``complete`` that contains ``prefix``; for a loopback prefix, only if that one is loopback too."""
    shortest = next((special.length for special in (*LOOPBACKS, *UNSPECIFIED) if prefix.inside(special)), 0)
    for length in lengths:
        if shortest <= length < prefix.length:
            wider = Prefix(prefix.network.supernet(new_prefix=length))
            if wider in complete:
                return wider
    return None
