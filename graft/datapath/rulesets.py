"""Compiled rules in the maps: written under a number of their own, erased by it, and looked up.

Writing only copies: graft/policy/compiler.py has decided everything. The lookups read the same maps in the same way as
the hooks, so that there is one set of rules; the hooks enforce it.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Collection, Mapping
from ipaddress import ip_address

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.kernel.bpf import Map
from graft.model.address import IPAddress, pack16
from graft.model.endpoint import in_order
from graft.policy.compiler import RuleSet
from graft.policy.model import Verdict


def write(maps: Maps, number: int, rules: RuleSet, endpoint_ids: Mapping[str, int]) -> None:
    """Put ``rules`` into the maps as ruleset ``number``. All of them, or none and the error is raised."""
    try:
        for bind in rules.ingress:
            any_ = bind.address is None
            in_key = layout.IngressKey(
                prefixlen=layout.INGRESS_FIXED_BITS + bind.port_bits,
                ruleset=number,
                protocol=bind.protocol,
                family=bind.family,
                any=any_,
                port_be=socket.htons(bind.port),
            )
            in_key.addr[:] = bind.address or bytes(16)
            maps.ingress.put(in_key, layout.IngressValue(endpoint_ids[bind.endpoint], bind.first_port))
        for prefix in rules.egress_prefixes:
            out_key = layout.EgressKey(
                prefixlen=layout.EGRESS_FIXED_BITS + prefix.prefix_len,
                ruleset=number,
                protocol=prefix.protocol,
                family=prefix.family,
            )
            out_key.addr[:] = prefix.address
            maps.egress.put(out_key, layout.EgressValue(prefix.node))
        for port in rules.egress_ports:
            port_key = layout.EgressPortKey(
                prefixlen=layout.EGRESS_PORT_FIXED_BITS + port.port_bits,
                ruleset=number,
                node=port.node,
                port_be=socket.htons(port.port),
            )
            endpoint = 0 if port.endpoint is None else endpoint_ids[port.endpoint]
            maps.egress_ports.put(port_key, layout.EgressPortValue(port.verdict, endpoint))
        write_groups(maps, number, rules.groups)
    except BaseException:
        erase(maps, number)
        raise


def erase(maps: Maps, number: int) -> None:
    """Remove every entry of ruleset ``number``."""
    write_groups(maps, number, ())
    tables: tuple[Map, ...] = (maps.ingress, maps.egress, maps.egress_ports)  # type: ignore[type-arg]
    for table in tables:
        for key in table.keys():  # noqa: SIM118
            if key.ruleset == number:
                table.delete(key)


def write_groups(maps: Maps, number: int, groups: Collection[IPAddress]) -> None:
    """Give an endpoint, or a ruleset, these multicast groups and no others."""
    wanted = {(group.version, pack16(group)) for group in groups}
    for key in maps.groups.keys():  # noqa: SIM118
        if key.id == number and (key.family, bytes(key.addr)) not in wanted:
            maps.groups.delete(key)
    for family, packed in wanted:
        new = layout.GroupKey(id=number, family=family)
        new.addr[:] = packed
        maps.groups.put(new, ctypes.c_uint32(1))


def groups_of(maps: Maps, number: int) -> tuple[IPAddress, ...]:
    """The multicast groups of an endpoint, in their order."""
    found = [(key.family, bytes(key.addr)) for key in maps.groups.keys() if key.id == number]  # noqa: SIM118
    return in_order(ip_address(packed[:4] if family == 4 else packed) for family, packed in found)


def using(maps: Maps, endpoint: int) -> set[int]:
    """The rulesets that name an endpoint."""
    found = {key.ruleset for key, value in maps.ingress.items() if value.endpoint == endpoint}
    found |= {key.ruleset for key, value in maps.egress_ports.items() if value.endpoint == endpoint}
    return found


def ingress_using(maps: Maps, endpoint: int) -> tuple[bool, bool]:
    """Whether rules redirect binds to an endpoint, and whether one of them is for binds of port 0."""
    keys = [key for key, value in maps.ingress.items() if value.endpoint == endpoint]
    return bool(keys), any(not key.port_be and key.prefixlen == layout.INGRESS_FIXED_BITS + 16 for key in keys)


def endpoints_of(maps: Maps, ruleset: int) -> set[int]:
    """The endpoints to which binds are redirected by a ruleset."""
    return {value.endpoint for key, value in maps.ingress.items() if key.ruleset == ruleset}


def endpoints_in_use(maps: Maps) -> set[int]:
    """The endpoints that any rule names."""
    used = {value.endpoint for _, value in maps.ingress.items()}
    return used | {value.endpoint for _, value in maps.egress_ports.items()}


class Lookup:
    """Looks up the rules of any container. Reuses its keys: it is on the path of every swapped socket."""

    def __init__(self, maps: Maps) -> None:
        self._ingress, self._egress, self._ports = maps.ingress, maps.egress, maps.egress_ports
        self._bind = layout.IngressKey(prefixlen=layout.INGRESS_FIXED_BITS + 16)
        self._to = layout.EgressKey()
        self._port = layout.EgressPortKey(prefixlen=layout.EGRESS_PORT_FIXED_BITS + 16)

    def ingress(self, ruleset: int, protocol: int, family: int, address: bytes, port: int) -> tuple[int, int]:
        """The id of the endpoint that a bind becomes, 0 for none, and the first port of the rule's range where the
        endpoint is a range. ``address`` as in the maps, 16 bytes.
        """
        key = self._bind
        key.ruleset, key.protocol, key.family, key.port_be = ruleset, protocol, family, socket.htons(port)
        key.any = 0
        ctypes.memmove(key.addr, address, 16)
        found = self._ingress.peek(key)
        if found is None:
            key.any = 1
            ctypes.memset(key.addr, 0, 16)
            found = self._ingress.peek(key)
        return (0, 0) if found is None else (found.endpoint, found.first_port)

    def egress(self, ruleset: int, protocol: int, family: int, address: bytes, port: int) -> tuple[int, int]:
        """(verdict, id of the source endpoint) of a destination; NONE where no rule covers it."""
        key = self._to
        key.prefixlen = layout.EGRESS_FIXED_BITS + (32 if family == 4 else 128)
        key.ruleset, key.protocol, key.family = ruleset, protocol, family
        ctypes.memmove(key.addr, address, 16)
        node = self._egress.peek(key)
        if node is None:
            return Verdict.NONE, 0
        port_key = self._port
        port_key.ruleset, port_key.node, port_key.port_be = ruleset, node.node, socket.htons(port)
        found = self._ports.peek(port_key)
        return (Verdict.NONE, 0) if found is None else (found.verdict, found.endpoint)
