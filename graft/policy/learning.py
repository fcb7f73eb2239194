"""The smallest policy that would have allowed what a container did. Pure.

Everything that was seen gets a rule of its own, and all else is denied. What the policy in force granted keeps its
endpoint; what had none gets a new one: a bind at the address that was asked for, a destination a source that the kernel
picks. Of an endpoint that is a range, a bind gets a new one too, at the port of it that it got: a rule for a range
grants all of its ports, and two such rules may contradict each other. (Two endpoints at one port do not: it is whose
socket binds it first.) A bind that stayed in the container's own namespace has no rule to be named by, so that it
decides the default.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from graft.model.address import BindPattern, IPAddress, Prefix, unmapped
from graft.model.endpoint import ANY_PROTOCOL, MAX_ENDPOINT_NAME, Endpoint, Protocol
from graft.model.ports import PortRange
from graft.policy.model import Default, EgressRule, IngressRule, Policy, Verdict
from graft.policy.validator import check_rules

_ANYWHERE = {4: "0.0.0.0", 6: "::"}
_LOOPBACK = {4: ip_address("127.0.0.1"), 6: ip_address("::1")}

_UNFIT = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True, slots=True)
class Observation:
    """A bind or a destination that was seen. ``endpoint`` is what the policy in force granted it, None where it did
    not; ``stays``: it is left to the container, its own stack or what the default lets it have. ``port`` is 0 for ICMP,
    and for a bind of a free port. ``got`` is which port of an endpoint that is a range a bind got.
    """

    is_bind: bool
    protocol: Protocol
    ip: IPAddress
    port: int
    endpoint: str | None = None
    stays: bool = False
    got: int = 0


def learn(
    name: str, seen: Iterable[Observation], known: Mapping[str, Endpoint], declared: Collection[str] = ()
) -> Policy:
    """A policy of that name. ``known`` are all endpoints that there are, and ``declared`` those of them that go with a
    policy: this one declares again what it needs of them.
    """
    observations = _one_of_each(_at_present(_judged(one), known) for one in seen)
    names = _Names(known)
    ingress = _ingress([one for one in observations if one.is_bind and not one.stays], known, names)
    egress = _egress([one for one in observations if not one.is_bind and _is_destination(one)], names)
    named = {rule.endpoint for rule in ingress} | {rule.endpoint for rule in egress}
    kept = tuple(known[key] for key in sorted(declared) if key in named)
    inside = any(one.is_bind and one.stays for one in observations)
    return Policy(
        name,
        endpoints=(*kept, *names.made),
        ingress=tuple(ingress),
        egress=tuple(egress),
        bind_default=Default.CONTAINER if inside else Default.DENY,
        connect_default=Default.DENY,
    )


def _judged(one: Observation) -> Observation:
    """The same, with the address that the hooks look up."""
    ip = unmapped(one.ip)
    return replace(one, ip=ip if one.is_bind or int(ip) else _LOOPBACK[ip.version])


def _at_present(one: Observation, known: Mapping[str, Endpoint]) -> Observation:
    """The same; without its endpoint where a rule cannot name that any more: it was deleted or changed meanwhile."""
    if one.endpoint is None:
        return one
    endpoint = known.get(one.endpoint)
    if endpoint is not None and one.is_bind and endpoint.last_port:
        endpoint = _one_port(endpoint, one.got) if endpoint.port <= one.got <= endpoint.last_port else None
    fits = endpoint is not None and not check_rules(_alone(one, one.endpoint), {one.endpoint: endpoint})
    return one if fits else replace(one, endpoint=None)


def _alone(one: Observation, endpoint: str) -> Policy:
    """A policy that leads it to that endpoint."""
    if one.is_bind:
        return Policy("", ingress=(_bind_rule(one, endpoint),))
    return Policy("", egress=(_destination_rule(one.ip, one.protocol, endpoint, [one.port]),))


def _one_port(endpoint: Endpoint, port: int) -> Endpoint:
    """One port of a range, for an endpoint that needs a name."""
    return replace(endpoint, name="", port=port, last_port=0, open=False)


def _one_of_each(seen: Iterable[Observation]) -> list[Observation]:
    """One for each address: a policy cannot say two things of it. (The policy in force may have changed meanwhile; and
    a destination may have been left to the container for one socket, and not for another.)
    """
    chosen: dict[tuple[bool, Protocol, IPAddress, int], Observation] = {}
    for one in sorted(set(seen), key=_order, reverse=True):
        key = (one.is_bind, one.protocol, one.ip, one.port)
        before = chosen.get(key)
        if before is None or (one.endpoint is not None) > (before.endpoint is not None) or before.stays > one.stays:
            chosen[key] = one
    return sorted(chosen.values(), key=_order)


def _is_destination(one: Observation) -> bool:
    """Whether a policy can grant it: there is no port 0 of TCP and UDP that anybody is at."""
    return one.port > 0 or one.protocol is Protocol.ICMP


def _order(one: Observation) -> tuple[object, ...]:
    return (
        not one.is_bind,
        one.ip.version,
        int(one.ip),
        one.protocol,
        one.port,
        one.endpoint or "",
        one.stays,
        one.got,
    )


class _Names:
    """New endpoints, each under a name that no other one has: what was done may lead to the same one."""

    def __init__(self, known: Collection[str]) -> None:
        self._taken = set(known)
        self._made: dict[tuple[str, Endpoint], Endpoint] = {}

    @property
    def made(self) -> tuple[Endpoint, ...]:
        """All of them."""
        return tuple(self._made.values())

    def of(self, wanted: str, like: Endpoint) -> str:
        """The name of one like that, for these protocols too, as near to ``wanted`` as can be."""
        key = wanted, replace(like, name="", protocols=ANY_PROTOCOL)
        before = self._made.get(key)
        name = self._free(wanted) if before is None else before.name
        protocols = like.protocols if before is None else like.protocols | before.protocols
        self._made[key] = replace(like, name=name, protocols=protocols)
        self._taken.add(name)
        return name

    def _free(self, wanted: str) -> str:
        """A valid name that is free."""
        plain = _UNFIT.sub("-", wanted).strip("-")
        numbered = (f"{plain[: MAX_ENDPOINT_NAME - 1 - len(str(number))]}-{number}" for number in itertools.count(2))
        return next(name for name in itertools.chain([plain[:MAX_ENDPOINT_NAME]], numbered) if name not in self._taken)


def _ingress(binds: Iterable[Observation], known: Mapping[str, Endpoint], names: _Names) -> list[IngressRule]:
    return [_bind_rule(one, _endpoint_of(one, known, names)) for one in binds]


def _endpoint_of(one: Observation, known: Mapping[str, Endpoint], names: _Names) -> str:
    """The name of the endpoint of a bind."""
    if one.endpoint is None:
        return names.of(f"learned-{one.ip}-{one.port or 'any'}", Endpoint("", one.ip, one.port, one.protocol))
    if known[one.endpoint].last_port:
        return names.of(f"learned-{one.endpoint}-{one.got}", _one_port(known[one.endpoint], one.got))
    return one.endpoint


def _bind_rule(one: Observation, endpoint: str) -> IngressRule:
    return IngressRule(BindPattern(one.ip, PortRange(one.port, one.port)), endpoint, one.protocol)


def _egress(destinations: Iterable[Observation], names: _Names) -> list[EgressRule]:
    grouped: dict[tuple[IPAddress, Protocol, str | None], list[int]] = {}
    for one in destinations:
        name = one.endpoint
        if name is None and not one.stays:
            version = one.ip.version
            name = names.of(f"learned-out{version}", Endpoint("", ip_address(_ANYWHERE[version]), 0))
        grouped.setdefault((one.ip, one.protocol, name), []).append(one.port)
    return [_destination_rule(*key, ports) for key, ports in grouped.items()]


def _destination_rule(ip: IPAddress, protocol: Protocol, endpoint: str | None, ports: Iterable[int]) -> EgressRule:
    verdict = Verdict.CONTAINER if endpoint is None else Verdict.GRANT
    ranges = None if protocol is Protocol.ICMP else tuple(_ranges(ports))
    return EgressRule(Prefix(ip_network(ip)), verdict, endpoint, ranges, protocol)


def _ranges(ports: Iterable[int]) -> list[PortRange]:
    """Ports in as few ranges as there can be."""
    found: list[PortRange] = []
    for port in sorted(set(ports)):
        if found and found[-1].last + 1 == port:
            found[-1] = PortRange(found[-1].first, port)
        else:
            found.append(PortRange(port, port))
    return found
