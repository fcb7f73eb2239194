"""`graft policy show`: the policy in force for a container, read from the maps; or what a policy would put there."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import NamedTuple

from graft.datapath.layout import EGRESS_FIXED_BITS, EGRESS_PORT_FIXED_BITS, INGRESS_FIXED_BITS
from graft.datapath.maps import Maps
from graft.datapath.rulesets import verdict_of
from graft.errors import NotFoundError
from graft.model.address import format_ip
from graft.model.endpoint import PROTOCOL_LABELS, Endpoint
from graft.model.settings import Settings
from graft.model.unix_socket import SCHEME, UNIX_FAMILY
from graft.policy.compiler import EgressPortEntry, IngressEntry, RuleSet
from graft.policy.model import Default, Policy, Verdict
from graft.state import unix_sockets
from graft.state.installation import Installation
from graft.state.records import Container

_ANY = {"tcp", "udp"}


@dataclass(frozen=True, slots=True, order=True)
class ActiveRule:
    """A rule: for which addresses, protocol and ports, and its outcome (an endpoint, deny or container).

    Of an endpoint that is a range, ``outcome`` has the ports that ``first`` to ``last`` become.
    """

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

    def port_of_endpoint(self, port: int) -> int:
        """What one of its ports becomes where the endpoint is a range; 0 where that has no ports."""
        first = self.outcome.rpartition(":")[2].partition("-")[0]
        return int(first) + port - self.first if first.isascii() and first.isdigit() else 0


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """The rules and defaults by which the hooks decide for a container."""

    rules: tuple[ActiveRule, ...]
    bind_default: str
    connect_default: str


class _Outcome(NamedTuple):
    """The outcome of a rule. Where its endpoint is a range of ports, ``text`` lacks them, ``port`` is its first one,
    and ``first_port`` that of the rule's range.
    """

    text: str
    port: int = 0
    first_port: int = 0

    def at(self, first: int, last: int) -> str:
        """The outcome for the ports ``first`` to ``last``."""
        if not self.port:
            return self.text
        shift = self.port - self.first_port
        return f"{self.text}:{first + shift}" + (f"-{last + shift}" if first != last else "")


class _Entry(NamedTuple):
    """Map entries of which each port has the same outcome."""

    direction: str
    protocol: str
    address: str
    outcome: _Outcome
    first: int
    last: int


def policy_in_force(graft: Installation, container: Container) -> PolicyInForce:
    """The policy in force for ``container``. Raises NotFoundError if it is not attached any more."""
    maps = graft.maps
    value = maps.containers.get(ctypes.c_uint32(container.id))
    if value is None:
        raise NotFoundError(f"container: {container.name!r} is not attached", "graft ps")
    endpoints = graft.endpoints.by_id()
    entries = [*_ingress(graft.settings, maps, value.ruleset, endpoints), *_egress(maps, value.ruleset, endpoints)]
    return PolicyInForce(
        tuple(_merge(entries)), Default(value.bind_default).name.lower(), Default(value.connect_default).name.lower()
    )


def _ports(port_be: int, bits: int) -> tuple[int, int]:
    """First and last port of a prefix of ``bits`` bits."""
    first = socket.ntohs(port_be)
    return first, first + (1 << (16 - bits)) - 1


def _address(raw: Iterable[int], family: int) -> str:
    packed = bytes(raw)
    return format_ip(ip_address(packed[:4] if family == 4 else packed))


def _outcome(endpoint: Endpoint | None, first_port: int = 0) -> _Outcome:
    if endpoint is None:
        return _Outcome("a deleted endpoint")
    if not first_port or not endpoint.last_port:
        return _Outcome(endpoint.format())
    return _Outcome(f"{endpoint.name} = {format_ip(endpoint.address)}", endpoint.port, first_port)


def _ingress(settings: Settings, maps: Maps, ruleset: int, endpoints: Mapping[int, Endpoint]) -> list[_Entry]:
    found = []
    for key, value in maps.ingress.items():
        if key.ruleset == ruleset:
            if key.family == UNIX_FAMILY:
                path = unix_sockets.rule_path(settings, bytes(key.addr))
                found.append(_Entry("ingress", "unix", path, _outcome(endpoints.get(value.endpoint)), 0, 65535))
                continue
            first, last = _ports(key.port_be, key.prefixlen - INGRESS_FIXED_BITS)
            address = f"* (IPv{key.family})" if key.any else _address(key.addr, key.family)
            outcome = _outcome(endpoints.get(value.endpoint), value.first_port)
            found.append(_Entry("ingress", _protocol(key.protocol), address, outcome, first, last))
    return found


def _egress(maps: Maps, ruleset: int, endpoints: Mapping[int, Endpoint]) -> list[_Entry]:
    nodes: dict[int, list[tuple[_Outcome, int, int]]] = {}
    for key, value in maps.egress_ports.items():
        if key.ruleset == ruleset:
            ports = _ports(key.port_be, key.prefixlen - EGRESS_PORT_FIXED_BITS)
            verdict, source = verdict_of(value.verdict), endpoints.get(value.endpoint)
            outcome = _outcome(source) if verdict is Verdict.GRANT else _Outcome(verdict.name.lower())
            nodes.setdefault(key.node, []).append((outcome, *ports))
    found = []
    for prefix, node in maps.egress.items():
        if prefix.ruleset == ruleset:
            address = f"{_address(prefix.addr, prefix.family)}/{prefix.prefixlen - EGRESS_FIXED_BITS}"
            for entry in nodes.get(node.node, []):
                found.append(_Entry("egress", _protocol(prefix.protocol), address, *entry))
    return found


def _merge(entries: list[_Entry]) -> list[ActiveRule]:
    """Rules: adjacent port ranges are merged, and entries that are the same for TCP and UDP (`any`)."""
    merged: list[_Entry] = []
    for entry in sorted(entries, key=lambda one: (one[:3], one.first)):
        before = merged[-1] if merged else None
        if before and before[:4] == entry[:4] and before.last + 1 == entry.first:
            merged[-1] = before._replace(last=entry.last)
        else:
            merged.append(entry)
    by_rest: dict[_Entry, set[str]] = {}
    for entry in merged:
        by_rest.setdefault(entry._replace(protocol=""), set()).add(entry.protocol)
    return [
        ActiveRule(
            entry.direction,
            protocol,
            entry.address,
            entry.first,
            entry.last,
            entry.outcome.at(entry.first, entry.last),
        )
        for entry, protocols in by_rest.items()
        for protocol in sorted({"any", *protocols} - _ANY if protocols >= _ANY else protocols)
    ]


def rules_of(policy: Policy, rules: RuleSet, endpoints: Mapping[str, Endpoint]) -> tuple[ActiveRule, ...]:
    """The rules that a policy would put in force; ``endpoints`` has all that it names. Pure."""
    entries = [
        *(
            _Entry("ingress", "unix", one.path, _outcome(endpoints[one.endpoint]), 0, 65535)
            for one in policy.unix_ingress
        ),
        *(_compiled_bind(one, endpoints[one.endpoint]) for one in rules.ingress if one.family != UNIX_FAMILY),
    ]
    nodes: dict[int, list[EgressPortEntry]] = {}
    for port in rules.egress_ports:
        nodes.setdefault(port.node, []).append(port)
    for prefix in rules.egress_prefixes:
        address = f"{_address(prefix.address, prefix.family)}/{prefix.prefix_len}"
        for port in nodes.get(prefix.node, []):
            granted = None if port.endpoint is None else endpoints[port.endpoint]
            outcome = _outcome(granted) if granted else _Outcome(port.verdict.name.lower())
            last = port.port + (1 << (16 - port.port_bits)) - 1
            entries.append(_Entry("egress", _protocol(prefix.protocol), address, outcome, port.port, last))
    return tuple(_merge(entries))


def _compiled_bind(one: IngressEntry, endpoint: Endpoint) -> _Entry:
    address = f"* (IPv{one.family})" if one.address is None else _address(one.address, one.family)
    last = one.port + (1 << (16 - one.port_bits)) - 1
    return _Entry("ingress", _protocol(one.protocol), address, _outcome(endpoint, one.first_port), one.port, last)


def _protocol(number: int) -> str:
    """A rule that is being erased has 0 for a moment (graft/datapath/rulesets.py)."""
    return PROTOCOL_LABELS.get(number, str(number))
