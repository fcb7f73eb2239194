"""What a policy says, from docs/policy.md and docs/security.md: the judge's own reading of a policy's description.

Nothing of Graft is used here, on purpose: a mistake in its matching must not be the judge's too. Where the documents
leave something open, the wider reading is taken: the judge says only what is surely not granted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from tests.fuzz.model import Egress, Endpoint, Ingress, World

LOOPBACKS = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
BY_NAME = (
    *(IPv6Network("fe80::/10"), IPv6Network("ff00::/8"), IPv4Network("224.0.0.0/4")),
    IPv4Network("255.255.255.255/32"),
)
KERNELS_CHOICE = range(32768, 61000)
"""Where the kernel picks ports (net.ipv4.ip_local_port_range)."""

Network = IPv4Network | IPv6Network
network = lru_cache(ip_network)


@lru_cache(4096)
def plain(address: str) -> str:
    """An address as text; ::ffff:192.0.2.1 is the IPv4 address in it, and a zone is left out."""
    found = ip_address(address.partition("%")[0])
    return str(getattr(found, "ipv4_mapped", None) or found)


def is_any(address: str) -> bool:
    """0.0.0.0 or ::."""
    return address in ("0.0.0.0", "::")


def has(endpoint: Endpoint | None, protocol: str) -> bool:
    """Whether there is such an endpoint, for that protocol."""
    return endpoint is not None and endpoint.protocol in ("any", protocol)


def stands_at(endpoint: Endpoint, address: str, port: int) -> bool:
    """Whether a packet or a socket with that own address is the endpoint's. One at no address has all of its family."""
    same = endpoint.address == address or (is_any(endpoint.address) and (":" in endpoint.address) == (":" in address))
    both = endpoint.address == "::" and endpoint.dual_stack
    last = endpoint.last or endpoint.port
    return (same or both) and (endpoint.port <= port <= last if endpoint.port else port in KERNELS_CHOICE)


def _meets(world: World, rule: Ingress, protocol: str, address: str, port: int) -> bool:
    endpoint = world.endpoint(rule.endpoint)
    if endpoint is None or not has(endpoint, protocol) or not rule.first <= port <= rule.last:
        return False
    if rule.address == "*":
        return (":" in endpoint.address) == (":" in address)
    return rule.address == address


def _of_smallest_range(rules: list[Ingress]) -> list[Ingress]:
    smallest = min((one.last - one.first for one in rules), default=0)
    return [one for one in rules if one.last - one.first == smallest]


def bind_rules(world: World, protocol: str, address: str, port: int) -> list[Ingress]:
    """The rules that decide a bind: of those for exactly this address, else of those for any, the smallest range's."""
    found = [one for one in world.policy.ingress if _meets(world, one, protocol, address, port)]
    return _of_smallest_range([one for one in found if one.address != "*"]) or _of_smallest_range(found)


def bind_outcomes(world: World, protocol: str, address: str, port: int) -> list[Endpoint]:
    """What a bind may become; of a range, one port. For ``[::]`` also what one of 0.0.0.0 becomes, if no IPv6 rule
    grants it.
    """
    found = bind_rules(world, protocol, address, port)
    if not found and address == "::":
        found = bind_rules(world, protocol, "0.0.0.0", port)
    outcomes = ((rule, world.endpoint(rule.endpoint)) for rule in found)
    return [_at_its_port(one, rule, port) for rule, one in outcomes if one]


def _at_its_port(endpoint: Endpoint, rule: Ingress, port: int) -> Endpoint:
    """What one port of a rule becomes."""
    return replace(endpoint, port=endpoint.port + port - rule.first, last=0) if endpoint.last else endpoint


def speaks_of(rule: Egress, protocol: str, address: str, port: int) -> bool:
    """Whether an egress rule is about a destination."""
    prefix, destination = network(rule.to), ip_address(address)
    if destination not in prefix or rule.protocol not in ("any", protocol) or (rule.ports and port not in rule.ports):
        return False
    guard = next((one for one in LOOPBACKS if destination in one), None)
    if guard is not None:
        return _inside(prefix, guard)
    is_grant = rule.outcome not in ("deny", "container")
    named = next((one for one in BY_NAME if destination in one), None)
    return not (is_grant and named is not None and not _inside(prefix, named))


def _inside(prefix: Network, guard: Network) -> bool:
    return prefix.version == guard.version and prefix.prefixlen >= guard.prefixlen


def egress_outcome(world: World, protocol: str, address: str, port: int) -> str:
    """``deny``, ``container``, an endpoint's name, or "" where no rule speaks of the destination. A rule counts for a
    protocol only where its endpoint has that one too.
    """
    best = max(
        (
            (network(rule.to).prefixlen, rule.outcome)
            for rule in world.policy.egress
            if speaks_of(rule, protocol, address, port) and _counts(world, rule, protocol)
        ),
        default=(0, ""),
        key=lambda one: one[0],
    )
    return best[1]


def _counts(world: World, rule: Egress, protocol: str) -> bool:
    endpoint = world.endpoint(rule.outcome)
    return rule.outcome in ("deny", "container") or endpoint is None or has(endpoint, protocol)


def may_reach(world: World, direct: bool, protocol: str, address: str, port: int) -> bool:
    """Whether a packet of the container's may go there from the host's stack."""
    outcome = egress_outcome(world, protocol, address, port)
    if outcome in ("", "container", "deny"):
        return direct and (outcome == "container" or (not outcome and world.policy.connect == "container"))
    return has(world.endpoint(outcome), protocol)


def may_leave_from(world: World, direct: bool, protocol: str, source: tuple[str, int], to: tuple[str, int]) -> bool:
    """Whether the rule for ``to`` lets it come from ``source``, of a socket that no ingress rule gave its endpoint."""
    endpoint = world.endpoint(egress_outcome(world, protocol, *to))
    if endpoint is None:
        return direct and (source[1] in KERNELS_CHOICE or may_come_from(world, direct, protocol, *source))
    return stands_at(endpoint, *source)


def binds_freely(world: World, direct: bool) -> bool:
    """Whether the container has every port of the host's, for it lives there."""
    return direct and world.policy.bind == "container"


def may_have_any_port(world: World, protocol: str, asked: tuple[str, int], own: tuple[str, int]) -> bool:
    """Whether a datagram socket that asked for no address and no port may have a port of the kernel's choice (swap)."""
    named = not is_any(asked[0]) or asked[1] or not is_any(own[0])
    return protocol == "udp" and not named and world.policy.bind == "container" and own[1] in KERNELS_CHOICE


def may_hold(world: World, direct: bool, protocol: str, address: str, port: int) -> bool:
    """Whether some bind of the container's may stand there."""
    endpoints = (world.endpoint(rule.endpoint) for rule in world.policy.ingress)
    return binds_freely(world, direct) or any(
        one and has(one, protocol) and stands_at(one, address, port) for one in endpoints
    )


def may_come_from(world: World, direct: bool, protocol: str, address: str, port: int) -> bool:
    """Whether some socket of the container's may have this address: an ingress endpoint, or an egress rule's source."""
    endpoints = (world.endpoint(rule.outcome) for rule in world.policy.egress)
    return may_hold(world, direct, protocol, address, port) or any(
        one and has(one, protocol) and stands_at(one, address, port) for one in endpoints
    )


def is_free(world: World, direct: bool) -> bool:
    """Whether nothing at all is denied, so that what no rule can speak of is left alone."""
    denied = any(rule.outcome == "deny" for rule in world.policy.egress)
    return binds_freely(world, direct) and world.policy.connect == "container" and not denied


def leaves_others(world: World, direct: bool) -> bool:
    """Whether sockets of protocols without rules are the container's to use."""
    return direct and (world.policy.other == "container" or (not world.policy.other and is_free(world, direct)))
