"""Which rule decides about an address, of those that are in force (graft/commands/policy_show.py). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network

from graft.commands.policy_show import ActiveRule
from graft.model.address import IPAddress, format_ip

_EITHER = ("tcp", "udp")


def deciding_bind(rules: Iterable[ActiveRule], protocol: str, ip: IPAddress, port: int) -> ActiveRule | None:
    """The rule by which the hooks decide about a bind: that of the address itself, then the one of any address.

    ``protocol`` is tcp or udp.
    """
    candidates = [one for one in _of(rules, "ingress", protocol) if one.first <= port <= one.last]
    for address in (format_ip(ip), f"* (IPv{ip.version})"):
        for one in candidates:
            if one.address == address:
                return one
    return None


def deciding_destination(rules: Sequence[ActiveRule], protocol: str, ip: IPAddress, port: int) -> ActiveRule | None:
    """The rule by which the hooks decide about a destination: of the longest prefix that contains it.

    ``protocol`` is tcp, udp or icmp, which has no ports.
    """
    containing = [(_network(one.address), one) for one in _of(rules, "egress", protocol)]
    inside = [(network.prefixlen, one) for network, one in containing if ip in network]
    longest = max((length for length, _ in inside), default=0)
    return next((one for length, one in inside if length == longest and one.first <= port <= one.last), None)


@lru_cache(maxsize=65536)
def _network(address: str) -> IPv4Network | IPv6Network:
    """``address`` is as `ActiveRule` has it: [fd00::]/8."""
    return ip_network(address.replace("[", "").replace("]", ""))


def _of(rules: Iterable[ActiveRule], direction: str, protocol: str) -> list[ActiveRule]:
    return [
        one
        for one in rules
        if one.direction == direction and (one.protocol == protocol or (one.protocol == "any" and protocol in _EITHER))
    ]
