"""Compiled rules in the maps: written under a number of their own, erased by it, and looked up.

Writing only copies: graft/policy/compiler.py has decided everything. The lookups read the same maps in the same way as
the hooks, so that there is one set of rules; the hooks enforce it.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from graft.datapath import layout
from graft.datapath.maps import Maps, needs_room
from graft.kernel import bpf_maps
from graft.kernel.bpf import Map
from graft.model.address import IPAddress, pack16
from graft.model.endpoint import in_order
from graft.policy.compiler import EgressPortEntry, RuleSet
from graft.policy.model import Verdict

_Table = Map[Any, Any]
_Value = ctypes.Structure | ctypes.c_uint32
_Entry = tuple[_Table, ctypes.Structure, _Value]


def write(maps: Maps, number: int, rules: RuleSet, endpoint_ids: Mapping[str, int]) -> None:
    """Put ``rules`` into the maps as ruleset ``number``. All of them, or none and the error is raised.

    Raises KernelError where the maps have no room for them.
    """
    _put_all(_entries(maps, number, rules, endpoint_ids))


def copy(maps: Maps, numbers: Mapping[int, int], endpoint: int, other: int) -> None:
    """Write rulesets under other numbers too (``numbers``: old to new), which lead to ``other`` where the old ones lead
    to ``endpoint``. An old one cannot be changed: tags of sockets have what was found in it.

    Raises what `write` raises.
    """
    _put_all(_copies(maps, numbers, endpoint, other))


def _put_all(entries: Iterable[_Entry], field: str = "policy") -> None:
    written: list[tuple[_Table, ctypes.Structure]] = []
    try:
        with needs_room(field):
            for table, key, value in entries:
                table.put(key, value)
                written.append((table, key))
    except BaseException:
        for table, key in reversed(written):
            table.delete(key)
        raise


def _copies(maps: Maps, numbers: Mapping[int, int], endpoint: int, other: int) -> Iterator[_Entry]:
    for use, how in maps.uses.items():
        if use.ruleset in numbers:
            to = other if use.endpoint == endpoint else use.endpoint
            yield maps.uses, layout.Use(numbers[use.ruleset], to), how
    tables: tuple[_Table, ...] = (maps.ingress, maps.egress, maps.egress_ports)
    for table in tables:
        for key, value in table.items():
            if key.ruleset in numbers:
                key.ruleset = numbers[key.ruleset]
                value.endpoint = other if value.endpoint == endpoint else value.endpoint
                yield table, key, value
    for group, one in maps.groups.items():
        if group.id in numbers:
            group.id = numbers[group.id]
            yield maps.groups, group, one


def _entries(maps: Maps, number: int, rules: RuleSet, endpoint_ids: Mapping[str, int]) -> Iterator[_Entry]:
    for endpoint, how in _uses(rules, endpoint_ids).items():
        yield maps.uses, layout.Use(number, endpoint), ctypes.c_uint32(how)
    for bind in rules.ingress:
        in_key = layout.IngressKey(
            prefixlen=layout.INGRESS_FIXED_BITS + bind.port_bits,
            ruleset=number,
            protocol=bind.protocol,
            family=bind.family,
            any=bind.address is None,
            port_be=socket.htons(bind.port),
        )
        in_key.addr[:] = bind.address or bytes(16)
        yield maps.ingress, in_key, layout.IngressValue(endpoint_ids[bind.endpoint], bind.first_port)
    of_all_ports = _of_all_ports(rules, endpoint_ids)
    for prefix in rules.egress_prefixes:
        out_key = layout.EgressKey(
            prefixlen=layout.EGRESS_FIXED_BITS + prefix.prefix_len,
            ruleset=number,
            protocol=prefix.protocol,
            family=prefix.family,
        )
        out_key.addr[:] = prefix.address
        yield maps.egress, out_key, layout.EgressValue(prefix.node, *of_all_ports.get(prefix.node, (Verdict.NONE, 0)))
    for port in rules.egress_ports:
        port_key = layout.EgressPortKey(
            prefixlen=layout.EGRESS_PORT_FIXED_BITS + port.port_bits,
            ruleset=number,
            node=port.node,
            port_be=socket.htons(port.port),
        )
        endpoint = 0 if port.endpoint is None else endpoint_ids[port.endpoint]
        yield maps.egress_ports, port_key, layout.EgressPortValue(_stored(port), endpoint)
    for group in rules.groups:
        yield maps.groups, _group_key(number, group.version, pack16(group)), ctypes.c_uint32(1)


def _uses(rules: RuleSet, endpoint_ids: Mapping[str, int]) -> dict[int, int]:
    """How a policy's rules use each endpoint that they name. In the maps before the rules: what is there of these, if
    whoever writes them is killed, is found by it (`with_endpoints`).
    """
    uses: dict[int, int] = defaultdict(int)
    for bind in rules.ingress:
        port_0 = layout.USE_PORT_0 * (not bind.port and bind.port_bits == 16)
        uses[endpoint_ids[bind.endpoint]] |= layout.USE_INGRESS | port_0
    for port in rules.egress_ports:
        if port.endpoint is not None:
            uses[endpoint_ids[port.endpoint]] |= 0
    return uses


def _stored(port: EgressPortEntry) -> int:
    """Its verdict, as it is in the maps."""
    return layout.VERDICT_NAMED if port.is_named else port.verdict


def verdict_of(stored: int) -> Verdict:
    """The verdict of an entry in the maps."""
    return Verdict.GRANT if stored == layout.VERDICT_NAMED else Verdict(stored)


def _of_all_ports(rules: RuleSet, endpoint_ids: Mapping[str, int]) -> dict[int, tuple[int, int]]:
    """Of the nodes whose ports all have the same entry: its verdict and endpoint, which spare the hooks a lookup."""
    entries = Counter(one.node for one in rules.egress_ports)
    return {
        one.node: (_stored(one), endpoint_ids[one.endpoint] if one.endpoint is not None else 0)
        for one in rules.egress_ports
        if not one.port_bits and entries[one.node] == 1
    }


def retire(maps: Maps, numbers: Iterable[int]) -> None:
    """Remove rulesets that no container has any more: a hook that has read an old number finds the old rules whole."""
    with contextlib.suppress(OSError):  # no memory: replaced all the same
        bpf_maps.wait_for_programs()
    for number in numbers:
        erase(maps, number)


def erase(maps: Maps, number: int) -> None:
    """Remove every entry of ruleset ``number``."""
    erase_groups(maps, number)
    for table, first, value in (
        (maps.ingress, layout.IngressKey(layout.INGRESS_FIXED_BITS + 16), layout.IngressValue()),
        (maps.egress, layout.EgressKey(layout.EGRESS_FIXED_BITS + 128), layout.EgressValue()),
        (maps.egress_ports, layout.EgressPortKey(layout.EGRESS_PORT_FIXED_BITS + 16), layout.EgressPortValue()),
    ):
        first.ruleset = number
        for key in _keys_of(table, first, value):
            table.delete(key)
    for use in maps.uses.keys():  # noqa: SIM118
        if use.ruleset == number:
            maps.uses.delete(use)


def _keys_of(table: _Table, first: Any, value: ctypes.Structure) -> list[Any]:
    """The keys of ``first``'s ruleset, without a walk through those of all others, very many.

    A trie gives its keys in the order of their bits, and the ruleset's number comes first (trie_get_next_key of the
    kernel's kernel/bpf/lpm_trie.c, from 5.2 on). ``first`` is before all others of its ruleset, as no rule is for its
    protocol, or its node; it is put there to begin with.
    """
    try:
        table.put(first, value)
    except OSError:  # there is no room for it
        return [key for key in table.keys() if key.ruleset == first.ruleset]  # noqa: SIM118
    found = [first]
    while (key := table.next_key(found[-1])) is not None and key.ruleset == first.ruleset:
        found.append(key)
    return found


@contextlib.contextmanager
def changed_groups(maps: Maps, number: int, groups: Collection[IPAddress]) -> Iterator[None]:
    """Give an endpoint these multicast groups and no others: new ones before the block, and where that fails, or finds
    no room, they are taken back; those that it has no more are deleted after the block. Raises KernelError.
    """
    wanted = {bytes(key): key for key in (_group_key(number, group.version, pack16(group)) for group in groups)}
    there = {bytes(key): key for key in _groups_keys(maps, number)}
    new = [key for packed, key in wanted.items() if packed not in there]
    _put_all(((maps.groups, key, ctypes.c_uint32(1)) for key in new), "multicast")
    try:
        yield
    except BaseException:
        for key in new:
            maps.groups.delete(key)
        raise
    for packed, key in there.items():
        if packed not in wanted:
            maps.groups.delete(key)


def erase_groups(maps: Maps, number: int) -> None:
    """Take all multicast groups from an endpoint, or a ruleset."""
    for key in _groups_keys(maps, number):
        maps.groups.delete(key)


def _groups_keys(maps: Maps, number: int) -> list[layout.GroupKey]:
    return [key for key in maps.groups.keys() if key.id == number]  # noqa: SIM118


def _group_key(number: int, family: int, packed: bytes) -> layout.GroupKey:
    key = layout.GroupKey(id=number, family=family)
    key.addr[:] = packed
    return key


def groups_of(maps: Maps, number: int) -> tuple[IPAddress, ...]:
    """The multicast groups of an endpoint, in their order."""
    found = [(key.family, bytes(key.addr)) for key in _groups_keys(maps, number)]
    return in_order(ip_address(packed[:4] if family == 4 else packed) for family, packed in found)


def using(maps: Maps, endpoint: int) -> set[int]:
    """The rulesets that name an endpoint."""
    return {use.ruleset for use in maps.uses.keys() if use.endpoint == endpoint}  # noqa: SIM118


def ingress_using(maps: Maps, endpoint: int) -> tuple[bool, bool]:
    """Whether rules redirect binds to an endpoint, and whether one of them is for binds of port 0."""
    how = [value.value for use, value in maps.uses.items() if use.endpoint == endpoint]
    return any(one & layout.USE_INGRESS for one in how), any(one & layout.USE_PORT_0 for one in how)


def endpoints_of(maps: Maps, ruleset: int) -> set[int]:
    """The endpoints to which binds are redirected by a ruleset."""
    found = ((use, value.value) for use, value in maps.uses.items())
    return {use.endpoint for use, how in found if use.ruleset == ruleset and how & layout.USE_INGRESS}


def used_by(maps: Maps, ruleset: int) -> set[int]:
    """All endpoints that a ruleset names."""
    return {use.endpoint for use in maps.uses.keys() if use.ruleset == ruleset}  # noqa: SIM118


def endpoints_in_use(maps: Maps) -> set[int]:
    """The endpoints that any rule names."""
    return {use.endpoint for use in maps.uses.keys()}  # noqa: SIM118


def with_endpoints(maps: Maps) -> set[int]:
    """The rulesets that name any endpoint."""
    return {use.ruleset for use in maps.uses.keys()}  # noqa: SIM118


class Lookup:
    """Looks up the rules of any container. Reuses its keys: it is on the path of every swapped socket."""

    def __init__(self, maps: Maps) -> None:
        self._ingress, self._egress, self._ports = maps.ingress, maps.egress, maps.egress_ports
        self._broadcasts, self._endpoints = maps.broadcasts, maps.endpoints
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
        if found is None:
            return Verdict.NONE, 0
        if found.verdict == Verdict.GRANT and protocol != socket.IPPROTO_TCP and family == 4:
            endpoint = self._endpoints.get(ctypes.c_uint32(found.endpoint))
            if endpoint is not None and self._is_broadcast(address, endpoint.netns):
                return Verdict.NONE, 0
        return verdict_of(found.verdict), found.endpoint

    def _is_broadcast(self, address: bytes, netns: int) -> bool:
        key = layout.HostAddress(netns=netns, family=4)
        key.addr[:] = address
        return self._broadcasts.peek(key) is not None
