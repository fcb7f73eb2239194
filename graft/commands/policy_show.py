"""`graft policy show`: the policy in force for a container, read from the maps."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from graft.datapath.layout import EGRESS_FIXED_BITS, EGRESS_PORT_FIXED_BITS, INGRESS_FIXED_BITS
from graft.datapath.maps import Maps
from graft.errors import NotFoundError
from graft.model.address import format_ip
from graft.model.settings import Settings
from graft.model.unix_socket import SCHEME, UNIX_FAMILY
from graft.policy.model import Default, Verdict
from graft.state import unix_sockets
from graft.state.installation import Installation
from graft.state.records import Container

_DELETED = "a deleted endpoint"
_PROTOCOLS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}


@dataclass(frozen=True, slots=True, order=True)
class ActiveRule:
    """A rule: for which addresses, protocol and ports, and its outcome (an endpoint, deny or container)."""

    direction: str
    protocol: str
    address: str
    first: int
    last: int
    outcome: str

    def __str__(self) -> str:
        leads = self.direction == "ingress" or self.outcome in ("deny", "container") or f"= {SCHEME}" in self.outcome
        arrow = "->" if leads else "from"
        return f"{self.direction} {self.protocol} {self.address}{self.ports} {arrow} {self.outcome}"

    @property
    def ports(self) -> str:
        """``:80``, ``:8000-8099``, or nothing for every port."""
        if (self.first, self.last) == (0, 65535):
            return ""
        return f":{self.first}" if self.first == self.last else f":{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """The rules and defaults by which the hooks decide for a container."""

    rules: tuple[ActiveRule, ...]
    bind_default: str
    connect_default: str


def policy_in_force(graft: Installation, container: Container) -> PolicyInForce:
    """The policy in force for ``container``. Raises NotFoundError if it is not attached any more."""
    maps = graft.maps
    value = maps.containers.get(ctypes.c_uint32(container.id))
    if value is None:
        raise NotFoundError(f"container: {container.name!r} is not attached", "graft ps")
    names = {stored.id: stored.endpoint.format() for stored in graft.endpoints.listing()}
    rules = [*_ingress(graft.settings, maps, value.ruleset, names), *_egress(maps, value.ruleset, names)]
    return PolicyInForce(
        tuple(_merge(rules)), Default(value.bind_default).name.lower(), Default(value.connect_default).name.lower()
    )


def _ports(port_be: int, bits: int) -> tuple[int, int]:
    """First and last port of a prefix of ``bits`` bits."""
    first = socket.ntohs(port_be)
    return first, first + (1 << (16 - bits)) - 1


def _address(raw: Iterable[int], family: int) -> str:
    packed = bytes(raw)
    return format_ip(ip_address(packed[:4] if family == 4 else packed))


def _ingress(settings: Settings, maps: Maps, ruleset: int, names: dict[int, str]) -> list[ActiveRule]:
    found = []
    for key, value in maps.ingress.items():
        if key.ruleset == ruleset:
            if key.family == UNIX_FAMILY:
                path = unix_sockets.rule_path(settings, bytes(key.addr))
                found.append(ActiveRule("ingress", "unix", path, 0, 65535, names.get(value.endpoint, _DELETED)))
                continue
            first, last = _ports(key.port_be, key.prefixlen - INGRESS_FIXED_BITS)
            address = f"* (IPv{key.family})" if key.any else _address(key.addr, key.family)
            outcome = names.get(value.endpoint, _DELETED)
            found.append(ActiveRule("ingress", _PROTOCOLS[key.protocol], address, first, last, outcome))
    return found


def _egress(maps: Maps, ruleset: int, names: dict[int, str]) -> list[ActiveRule]:
    nodes: dict[int, list[tuple[int, int, str]]] = {}
    for key, value in maps.egress_ports.items():
        if key.ruleset == ruleset:
            first, last = _ports(key.port_be, key.prefixlen - EGRESS_PORT_FIXED_BITS)
            granted = value.verdict == Verdict.GRANT
            outcome = names.get(value.endpoint, _DELETED) if granted else Verdict(value.verdict).name.lower()
            nodes.setdefault(key.node, []).append((first, last, outcome))
    found = []
    for prefix, node in maps.egress.items():
        if prefix.ruleset == ruleset:
            address = f"{_address(prefix.addr, prefix.family)}/{prefix.prefixlen - EGRESS_FIXED_BITS}"
            for first, last, outcome in nodes.get(node.node, []):
                found.append(ActiveRule("egress", _PROTOCOLS[prefix.protocol], address, first, last, outcome))
    return found


def _merge(rules: list[ActiveRule]) -> list[ActiveRule]:
    """Merge adjacent port ranges, and rules that are the same for both protocols (`any`)."""
    merged: list[ActiveRule] = []
    for rule in sorted(rules):
        before = merged[-1] if merged else None
        same = before and (before.direction, before.protocol, before.address, before.outcome, before.last + 1) == (
            rule.direction,
            rule.protocol,
            rule.address,
            rule.outcome,
            rule.first,
        )
        if before and same:
            merged[-1] = ActiveRule(rule.direction, rule.protocol, rule.address, before.first, rule.last, rule.outcome)
        else:
            merged.append(rule)
    by_rest: dict[tuple[str, str, int, int, str], set[str]] = {}
    for rule in merged:
        key = (rule.direction, rule.address, rule.first, rule.last, rule.outcome)
        by_rest.setdefault(key, set()).add(rule.protocol)
    return [
        ActiveRule(direction, "any" if len(protocols) == 2 else next(iter(protocols)), address, first, last, outcome)
        for (direction, address, first, last, outcome), protocols in by_rest.items()
    ]
