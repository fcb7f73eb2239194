"""The smallest policy that would have allowed what a container did. Pure.

Everything that was seen gets a rule of its own, and all else is denied. What the policy in force granted keeps its
endpoint; what had none gets a new one: a bind at the address that was asked for, a destination a source that the kernel
picks. A bind that stayed in the container's own namespace has no rule to be named by, so that it decides the default.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from graft.model.address import BindPattern, IPAddress, Prefix, unmapped
from graft.model.endpoint import MAX_ENDPOINT_NAME, Endpoint, Protocol
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


def learn(
    name: str, seen: Iterable[Observation], declared: Mapping[str, Endpoint], taken: Collection[str] = ()
) -> Policy:
    """A policy of that name. ``declared`` are endpoints that the policy in force declares: this one declares those
    of them that it needs. ``taken`` are the names of other endpoints.
    """
    observations = _one_of_each(seen)
    names = _Names(declared, taken)
    ingress = _ingress([one for one in observations if one.is_bind and not one.stays], names)
    egress = _egress([one for one in observations if not one.is_bind and _is_destination(one)], names)
    named = {rule.endpoint for rule in ingress} | {rule.endpoint for rule in egress}
    kept = tuple(endpoint for key, endpoint in sorted(declared.items()) if key in named)
    inside = any(one.is_bind and one.stays for one in observations)
    return Policy(
        name,
        endpoints=(*kept, *names.made),
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
    for one in sorted({replace(one, ip=unmapped(one.ip)) for one in seen}, key=_order, reverse=True):
        ip = one.ip if one.is_bind or int(one.ip) else _LOOPBACK[one.ip.version]  # it is judged as that
        key = (one.is_bind, one.protocol, ip, one.port)
        before = chosen.get(key)
        if before is None or (one.endpoint is not None) > (before.endpoint is not None) or before.stays > one.stays:
            chosen[key] = replace(one, ip=ip)
    return sorted(chosen.values(), key=_order)


def _is_destination(one: Observation) -> bool:
    """Whether a policy can grant it: there is no port 0 of TCP and UDP that anybody is at."""
    return one.port > 0 or one.protocol is Protocol.ICMP


def _order(one: Observation) -> tuple[object, ...]:
    return (not one.is_bind, one.ip.version, int(one.ip), one.protocol, one.port, one.endpoint or "", one.stays)


class _Names:
    """New endpoints, each under a name that no other one has: what was done may lead to the same one."""

    def __init__(self, declared: Mapping[str, Endpoint], taken: Collection[str]) -> None:
        self._taken = {*declared, *taken}
        self._made: dict[tuple[str, IPAddress, int], Endpoint] = {}

    @property
    def made(self) -> tuple[Endpoint, ...]:
        """All of them."""
        return tuple(self._made.values())

    def of(self, wanted: str, ip: IPAddress, port: int, protocols: Protocol | None = None) -> str:
        """The name of one at that address, for these protocols too (None: all), as near to ``wanted`` as can be."""
        key = wanted, ip, port
        before = self._made.get(key)
        name = self._free(wanted) if before is None else before.name
        both = None if protocols is None else protocols | (protocols if before is None else before.protocols)
        self._made[key] = Endpoint(name, ip, port) if both is None else Endpoint(name, ip, port, both)
        self._taken.add(name)
        return name

    def _free(self, wanted: str) -> str:
        """A valid name that is free."""
        plain = _UNFIT.sub("-", wanted).strip("-")
        numbered = (f"{plain[: MAX_ENDPOINT_NAME - 1 - len(str(number))]}-{number}" for number in itertools.count(2))
        return next(name for name in itertools.chain([plain[:MAX_ENDPOINT_NAME]], numbered) if name not in self._taken)


def _ingress(binds: Iterable[Observation], names: _Names) -> list[IngressRule]:
    rules: list[IngressRule] = []
    for one in binds:
        wanted = f"learned-{one.ip}-{one.port or 'any'}"
        name = one.endpoint or names.of(wanted, one.ip, one.port, one.protocol)
        pattern = BindPattern(one.ip, PortRange(one.port, one.port))
        rules.append(IngressRule(pattern, name, one.protocol))
    return rules


def _egress(destinations: Iterable[Observation], names: _Names) -> list[EgressRule]:
    grouped: dict[tuple[IPAddress, Protocol, str | None], list[int]] = {}
    for one in destinations:
        name = one.endpoint
        if name is None and not one.stays:
            version = one.ip.version
            name = names.of(f"learned-out{version}", ip_address(_ANYWHERE[version]), 0)
        grouped.setdefault((one.ip, one.protocol, name), []).append(one.port)
    rules = []
    for (ip, protocol, endpoint), ports in grouped.items():
        verdict = Verdict.CONTAINER if endpoint is None else Verdict.GRANT
        ranges = None if protocol is Protocol.ICMP else tuple(_ranges(ports))
        rules.append(EgressRule(Prefix(ip_network(ip)), verdict, endpoint, ranges, protocol))
    return rules


def _ranges(ports: Iterable[int]) -> list[PortRange]:
    """Ports in as few ranges as there can be."""
    found: list[PortRange] = []
    for port in sorted(set(ports)):
        if found and found[-1].last + 1 == port:
            found[-1] = PortRange(found[-1].first, port)
        else:
            found.append(PortRange(port, port))
    return found
