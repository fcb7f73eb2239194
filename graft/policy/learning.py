"""The smallest policy that would have allowed what a container did. Pure.

Everything that was seen gets a rule of its own, and all else is denied. What the policy in force granted keeps its
endpoint; what had none gets a new one: a bind at the address that was asked for, a destination a source that the kernel
picks. A bind that stayed in the container's own namespace has no rule to be named by, so that it decides the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from graft.model.address import BindPattern, IPAddress, Prefix
from graft.model.endpoint import Endpoint, Protocol
from graft.model.ports import PortRange
from graft.policy.model import Default, EgressRule, IngressRule, Policy, Verdict

_ANYWHERE = {4: "0.0.0.0", 6: "::"}
_LOOPBACK = {4: ip_address("127.0.0.1"), 6: ip_address("::1")}
_UNFIT = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True, slots=True)
class Observation:
    """A bind or a destination that was seen. ``endpoint`` is what the policy in force granted it, None where it did
    not; ``stays``: it is left to the container's own stack. ``port`` is 0 for ICMP, and for a bind of a free port.
    """

    is_bind: bool
    protocol: Protocol
    ip: IPAddress
    port: int
    endpoint: str | None = None
    stays: bool = False


def learn(name: str, seen: Iterable[Observation], declared: Mapping[str, Endpoint]) -> Policy:
    """A policy of that name. ``declared`` are endpoints that the policy in force declares: this one declares those
    of them that it needs.
    """
    observations = _one_of_each(seen)
    ingress, made = _ingress([one for one in observations if one.is_bind and not one.stays])
    egress, sources = _egress([one for one in observations if not one.is_bind])
    named = {rule.endpoint for rule in ingress} | {rule.endpoint for rule in egress}
    kept = tuple(endpoint for key, endpoint in sorted(declared.items()) if key in named)
    inside = any(one.is_bind and one.stays for one in observations)
    return Policy(
        name,
        endpoints=(*kept, *made, *sources),
        ingress=tuple(ingress),
        egress=tuple(egress),
        bind_default=Default.CONTAINER if inside else Default.DENY,
        connect_default=Default.DENY,
    )


def _one_of_each(seen: Iterable[Observation]) -> list[Observation]:
    """One for each address: a policy cannot say two things of it. (The policy in force may have changed meanwhile; and
    a destination may have been left to the container for one socket, and not for another.)
    """
    chosen: dict[tuple[bool, Protocol, IPAddress, int], Observation] = {}
    for one in sorted(set(seen), key=_order, reverse=True):
        ip = one.ip if one.is_bind or int(one.ip) else _LOOPBACK[one.ip.version]  # it is judged as that
        key = (one.is_bind, one.protocol, ip, one.port)
        before = chosen.get(key)
        if before is None or (one.endpoint is not None) > (before.endpoint is not None) or before.stays > one.stays:
            chosen[key] = replace(one, ip=ip)
    return sorted(chosen.values(), key=_order)


def _order(one: Observation) -> tuple[object, ...]:
    return (not one.is_bind, one.ip.version, int(one.ip), one.protocol, one.port, one.endpoint or "", one.stays)


def _ingress(binds: Iterable[Observation]) -> tuple[list[IngressRule], list[Endpoint]]:
    rules: list[IngressRule] = []
    made: dict[str, Endpoint] = {}
    for one in binds:
        name = one.endpoint
        if name is None:
            name = _name("learned", one.ip, one.port or "any")
            before = made.get(name)
            protocols = one.protocol if before is None else before.protocols | one.protocol
            made[name] = Endpoint(name, one.ip, one.port, protocols)
        pattern = BindPattern(one.ip, PortRange(one.port, one.port))
        rules.append(IngressRule(pattern, name, one.protocol))
    return rules, list(made.values())


def _name(*parts: object) -> str:
    """A valid name of an endpoint."""
    return _UNFIT.sub("-", "-".join(map(str, parts))).strip("-")[:31]


def _egress(destinations: Iterable[Observation]) -> tuple[list[EgressRule], list[Endpoint]]:
    grouped: dict[tuple[IPAddress, Protocol, str | None], list[int]] = {}
    sources: dict[str, Endpoint] = {}
    for one in destinations:
        name = one.endpoint
        if name is None and not one.stays:
            name = f"learned-out{one.ip.version}"
            sources[name] = Endpoint(name, ip_address(_ANYWHERE[one.ip.version]), 0)
        grouped.setdefault((one.ip, one.protocol, name), []).append(one.port)
    rules = []
    for (ip, protocol, endpoint), ports in grouped.items():
        verdict = Verdict.CONTAINER if endpoint is None else Verdict.GRANT
        ranges = None if protocol is Protocol.ICMP else tuple(_ranges(ports))
        rules.append(EgressRule(Prefix(ip_network(ip)), verdict, endpoint, ranges, protocol))
    return rules, list(sources.values())


def _ranges(ports: Iterable[int]) -> list[PortRange]:
    """Ports in as few ranges as there can be."""
    found: list[PortRange] = []
    for port in sorted(set(ports)):
        if found and found[-1].last + 1 == port:
            found[-1] = PortRange(found[-1].first, port)
        else:
            found.append(PortRange(port, port))
    return found
