"""Addresses, ports and prefixes as an operator writes them, and back.

Every parser takes the text and the name of its field, and raises UsageError with one
line that names the field. An IPv4-mapped IPv6 address (``::ffff:1.2.3.4``) is treated as the IPv4 address in it,
everywhere: the kernel sends and receives plain IPv4 for it. Zones (``fe80::1%eth0``) are refused: the
maps have no field for an interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

from graft.errors import UsageError
from graft.model.ports import MAX_PORT, PortRange

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

MAPPED_BITS = 96
"""Length of ``::ffff:0:0/96``, the prefix of the IPv4-mapped addresses (RFC 4291, 2.5.5.2)."""

_MAPPED = bytes(10) + b"\xff\xff"
DYNAMIC = "dynamic"
ANY_FREE_PORT = "0"
"""The port of bind(2) that leaves the choice to the kernel."""
_SHOWN = 64
_ADDRESS_HINT = "an IPv4 address, or an IPv6 address in brackets, such as [::1]"


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """An IP address and a port; port 0: the kernel picks one. ``last_port``: of a range of ports, 0 where it is one."""

    ip: IPAddress
    port: int
    last_port: int = 0

    @property
    def family(self) -> int:
        """4 or 6 (GRAFT_IPV4, GRAFT_IPV6 of bpf/graft.h)."""
        return self.ip.version

    @property
    def packed16(self) -> bytes:
        """The address in 16 bytes, as in the maps."""
        return pack16(self.ip)

    def __str__(self) -> str:
        return f"{format_ip(self.ip)}:{self.port}" + (f"-{self.last_port}" if self.last_port else "")


@dataclass(frozen=True, slots=True)
class BindPattern:
    """The binds that a rule matches: an address, or None for any, and a range of ports."""

    address: IPAddress | None
    ports: PortRange

    def __str__(self) -> str:
        return f"{'*' if self.address is None else format_ip(self.address)}:{self.ports}"


@dataclass(frozen=True, slots=True)
class Prefix:
    """A block of addresses of one family."""

    network: IPNetwork

    @property
    def family(self) -> int:
        """4 or 6."""
        return self.network.version

    @property
    def length(self) -> int:
        """The number of leading bits that the prefix fixes."""
        return self.network.prefixlen

    @property
    def packed16(self) -> bytes:
        """Its first address in 16 bytes."""
        return pack16(self.network.network_address)

    def __contains__(self, ip: IPAddress) -> bool:
        return ip in self.network

    def inside(self, other: Prefix) -> bool:
        """Whether ``other`` contains all of it."""
        return self.family == other.family and self.length >= other.length and self.network[0] in other

    def __str__(self) -> str:
        return str(self.network)


def pack16(ip: IPAddress) -> bytes:
    """``ip`` in network order in 16 bytes, an IPv4 address in the first four (bpf/graft.h)."""
    return ip.packed.ljust(16, b"\0")


def format_ip(ip: IPAddress) -> str:
    """``ip`` as written before a colon and a port."""
    return str(ip) if ip.version == 4 else f"[{ip}]"


def unmapped(ip: IPAddress) -> IPAddress:
    """``ip``, or the IPv4 address in it if it is an IPv4-mapped one."""
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def unmapped_bytes(address: bytes) -> tuple[int, bytes]:
    """Family (4 or 6) and the 16 bytes for the maps, from the 16 bytes of an IPv6 address."""
    return (4, address[12:] + bytes(12)) if address.startswith(_MAPPED) else (6, address)


def mapped_text(ipv4: str) -> str:
    """The IPv4-mapped IPv6 address of ``ipv4``, as an IPv6 socket takes it."""
    return f"::ffff:{ipv4}"


def shown(text: str) -> str:
    """``text`` quoted for an error message: escaped, and cut if it is long."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def parse_ip(text: str, field: str = "address") -> IPAddress:
    """An address with no port and no brackets."""
    if "%" in text:
        raise UsageError(f"{field}: {shown(text)} has a zone", "leave out % and what follows it")
    try:
        return unmapped(IPv6Address(text)) if ":" in text else IPv4Address(text)
    except AddressValueError:
        raise UsageError(f"{field}: {shown(text)} is not an IP address", _ADDRESS_HINT) from None


def parse_port(text: str, field: str = "port") -> int:
    """A port from 1 to 65535, in plain decimal digits."""
    if not (text.isascii() and text.isdigit()) or (text.startswith("0") and text != "0"):
        raise UsageError(f"{field}: {shown(text)} is not a port", f"a number from 1 to {MAX_PORT}")
    if len(text) > len(str(MAX_PORT)) or not 1 <= int(text) <= MAX_PORT:
        raise UsageError(f"{field}: port {shown(text)[1:-1]} is out of range", f"a number from 1 to {MAX_PORT}")
    return int(text)


def parse_port_range(text: str, field: str = "ports") -> PortRange:
    """``PORT`` or ``FIRST-LAST``."""
    first_text, dash, last_text = text.partition("-")
    if dash and not (first_text and last_text):
        raise UsageError(f"{field}: {shown(text)} is not a range of ports", "FIRST-LAST, such as 8000-8099")
    first = parse_port(first_text, field)
    last = parse_port(last_text, field) if dash else first
    if first > last:
        raise UsageError(f"{field}: {shown(text)} runs backwards", f"{last}-{first}")
    return PortRange(first, last)


def parse_socket_address(text: str, field: str = "address", *, endpoint: bool = False) -> SocketAddress:
    """``1.2.3.4:80`` or ``[::1]:80``; of an ``endpoint`` also ``:8000-8099``, and ``:dynamic`` or ``:0``: port 0."""
    address, port = _split_port(text, field)
    ip = _parse_bracketed(address, field)
    if not endpoint:
        return SocketAddress(ip, parse_port(port, field))
    if port in (DYNAMIC, ANY_FREE_PORT):
        return SocketAddress(ip, 0)
    ports = parse_port_range(port, field)
    return SocketAddress(ip, ports.first, ports.last if len(ports) > 1 else 0)


def parse_bind_pattern(text: str, field: str = "bind") -> BindPattern:
    """``ADDR:PORT``, ``ADDR:FIRST-LAST``, or the same with ``*`` for any address. Port 0: binds of port 0, no other."""
    address, ports = _split_port(text, field)
    ip = None if address == "*" else _parse_bracketed(address, field)
    return BindPattern(ip, PortRange(0, 0) if ports == ANY_FREE_PORT else parse_port_range(ports, field))


def parse_prefix(text: str, field: str = "to") -> Prefix:
    """``10.0.0.0/8`` or ``2001:db8::/32``; an address alone is a prefix of full length."""
    address, slash, length_text = text.partition("/")
    if "%" in text:
        raise UsageError(f"{field}: {shown(text)} has a zone", "leave out % and what follows it")
    try:
        ip = IPv6Address(address) if ":" in address else IPv4Address(address)
    except AddressValueError:
        raise UsageError(f"{field}: {shown(text)} is not a prefix", "such as 10.0.0.0/8, ::/0 or 192.0.2.1") from None
    length = _parse_length(length_text, ip.max_prefixlen, field) if slash else ip.max_prefixlen
    network = _strict_network(ip, length, text, field)
    return Prefix(_unmapped_network(network))


def _split_port(text: str, field: str) -> tuple[str, str]:
    address, colon, port = text.rpartition(":")
    if not colon or not port or text.endswith("]"):
        raise UsageError(f"{field}: {shown(text)} has no port", "ADDR:PORT, such as 0.0.0.0:80 or [::]:80")
    if ":" in address and not address.startswith("["):
        raise UsageError(f"{field}: {shown(text)} is an IPv6 address without brackets", "[ADDR]:PORT, such as [::]:80")
    return address, port


def _parse_bracketed(text: str, field: str) -> IPAddress:
    if not text.startswith("["):
        return parse_ip(text, field)
    inside = text[1:-1]
    if not text.endswith("]") or ":" not in inside:
        raise UsageError(f"{field}: {shown(text)} is not an IPv6 address in brackets", "such as [::1]")
    return parse_ip(inside, field)


def _parse_length(text: str, longest: int, field: str) -> int:
    if text not in map(str, range(longest + 1)):
        raise UsageError(f"{field}: /{shown(text)[1:-1]} is not a prefix length", f"a number from 0 to {longest}")
    return int(text)


def _strict_network(ip: IPAddress, length: int, text: str, field: str) -> IPNetwork:
    kind = IPv4Network if isinstance(ip, IPv4Address) else IPv6Network
    network = kind((int(ip), length), strict=False)
    if network.network_address != ip:
        raise UsageError(f"{field}: {shown(text)} has bits set after its prefix length", f"{network}, or a longer one")
    return network


def _unmapped_network(network: IPNetwork) -> IPNetwork:
    inner = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if inner is None or network.prefixlen < MAPPED_BITS:
        return network
    return IPv4Network((int(inner), network.prefixlen - MAPPED_BITS))
