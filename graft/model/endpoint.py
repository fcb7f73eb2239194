"""Endpoints: named addresses of a network stack, and the flags of `graft run` that refer to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from ipaddress import IPv6Address, ip_address

from graft.errors import UsageError
from graft.model.address import (
    DYNAMIC,
    BindPattern,
    IPAddress,
    Prefix,
    SocketAddress,
    format_ip,
    pack16,
    parse_bind_pattern,
    parse_prefix,
    parse_socket_address,
    shown,
)

MAX_ENDPOINT_NAME = 31
"""Bytes of an endpoint's name: GRAFT_NAME_LEN of bpf/graft.h without the closing NUL."""

MAX_POLICY_NAME = 63

MAX_GROUPS = 64
"""Multicast groups of an endpoint: all of them share a map (GRAFT_MAX_GROUPS)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_NETNS_NAME = re.compile(r"[A-Za-z0-9_.:@-]{1,255}", re.ASCII)
_PATH_MAX = 4095  # PATH_MAX of linux/limits.h without the closing NUL


class Protocol(IntFlag):
    """Transport protocols: GRAFT_TCP and GRAFT_UDP of bpf/graft.h. ICMP: only in rules of egress, for echo requests."""

    TCP = 1
    UDP = 2
    ICMP = 4

    @property
    def label(self) -> str:
        """As an operator writes it: tcp, udp or any."""
        return "any" if self == ANY_PROTOCOL else str(self.name).lower()


ANY_PROTOCOL = Protocol.TCP | Protocol.UDP

IP_PROTOCOLS: dict[Protocol, int] = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.ICMP: 1}
"""Numbers in the maps' keys: IPPROTO_TCP, IPPROTO_UDP and IPPROTO_ICMP (of both families) of linux/in.h."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A named address of a network stack, the host's unless ``netns`` names another one.

    ``port`` 0 is dynamic: the kernel picks. ``netns`` is a name, a pid or a path, as the operator wrote
    it. ``open`` lets a container request it through its environment. An IPv6 endpoint accepts IPv6 clients only, unless
    it is ``dual_stack``. ``last_port``: it is a range of ports that begins at ``port``; 0: it is one. Sockets that are
    bound to it may join the groups in ``multicast``.
    """

    name: str
    address: IPAddress
    port: int
    protocols: Protocol = ANY_PROTOCOL
    netns: str | None = None
    open: bool = False
    dual_stack: bool = False
    last_port: int = 0
    multicast: tuple[IPAddress, ...] = ()

    @property
    def port_count(self) -> int:
        """How many ports it has; a dynamic one counts as one."""
        return self.last_port - self.port + 1 if self.last_port else 1

    @property
    def family(self) -> int:
        """4 or 6."""
        return self.address.version

    @property
    def packed16(self) -> bytes:
        """The address in 16 bytes, as in the maps."""
        return pack16(self.address)

    @property
    def spec(self) -> str:
        """``ADDR:PORT`` as an operator writes it."""
        return self.spec_at(self.port, self.last_port)

    def spec_at(self, port: int, last_port: int = 0) -> str:
        """The same for some of its ports; port 0: dynamic."""
        if not port:
            return f"{format_ip(self.address)}:{DYNAMIC}"
        return str(SocketAddress(self.address, port, last_port))

    def format(self) -> str:
        """One line for people: ``nx4 = 0.0.0.0:8080``."""
        return f"{self.name} = {self.spec}"


def parse_endpoint(
    name: str,
    spec: str,
    proto: str = "any",
    netns: str | None = None,
    open_: bool = False,
    dual_stack: bool = False,
    multicast: Sequence[str] = (),
) -> Endpoint:
    """The endpoint ``name`` at ``spec`` (``ADDR:PORT``, ``[ADDR6]:PORT``, port also FIRST-LAST, ``dynamic`` or 0).

    Raises UsageError that names the field: name, address, protocol, netns, dual stack or multicast.
    """
    parse_name(name)
    address = parse_endpoint_address(spec)
    check_dual_stack(dual_stack, address)
    protocols = parse_protocol(proto)
    groups = in_order(parse_group(group) for group in multicast)
    check_multicast(groups, address, protocols)
    return Endpoint(
        name=name,
        address=address.ip,
        port=address.port,
        protocols=protocols,
        netns=None if netns is None else parse_netns(netns),
        open=open_,
        dual_stack=dual_stack,
        last_port=address.last_port,
        multicast=groups,
    )


def check_dual_stack(wanted: bool, address: SocketAddress, field: str = "dual stack") -> None:
    """Raises UsageError where an endpoint at ``address`` cannot accept IPv4 clients too."""
    if wanted and address.ip != IPv6Address(0):
        raise UsageError(f"{field}: only the address [::] can accept IPv4 clients too", "[::]:PORT, or leave it out")


def parse_group(text: str, field: str = "multicast") -> IPAddress:
    """A multicast group. Raises UsageError."""
    try:
        group = ip_address(text)
    except ValueError:
        raise UsageError(
            f"{field}: {shown(text)} is not an IP address", "a group such as 239.1.1.1 or ff02::fb"
        ) from None
    if not group.is_multicast or "%" in text:
        raise UsageError(
            f"{field}: {shown(text)} is not a multicast group", "in 224.0.0.0/4 or ff00::/8, without a zone"
        )
    return group


def in_order(groups: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    """Each of ``groups`` once, in the order of their numbers."""
    return tuple(sorted(set(groups), key=lambda group: (group.version, int(group))))


def check_multicast(
    groups: Collection[IPAddress], address: SocketAddress, protocols: Protocol, field: str = "multicast"
) -> None:
    """Raises UsageError where sockets at ``address`` cannot receive what is sent to these groups."""
    if not groups:
        return
    if not address.ip.is_unspecified:  # the kernel hands a group's datagrams to no socket that has another address
        raise UsageError(f"{field}: an endpoint with groups is at 0.0.0.0 or [::]", f"0.0.0.0:{address.port or 'PORT'}")
    if not protocols & Protocol.UDP:
        raise UsageError(f"{field}: groups are for udp, the endpoint is for {protocols.label}", "udp or any")
    if len(groups) > MAX_GROUPS:
        raise UsageError(f"{field}: more than {MAX_GROUPS} groups", "another endpoint for the others")
    for group in groups:
        if group.version != address.ip.version:
            message = f"{field}: {group} is not of the endpoint's family, IPv{address.ip.version}"
            raise UsageError(message, "an endpoint for each family")


def parse_name(text: str, field: str = "name", longest: int = MAX_ENDPOINT_NAME) -> str:
    """``text`` itself, if it may name an endpoint (or, with another ``longest``, a policy)."""
    hint = f"1 to {longest} of the characters A-Z a-z 0-9 _ . -, the first a letter or a digit"
    if not text:
        raise UsageError(f"{field}: the name is empty", hint)
    if len(text.encode(errors="replace")) > longest:
        raise UsageError(f"{field}: {shown(text)} is longer than {longest} bytes", hint)
    if not _NAME.fullmatch(text):
        raise UsageError(f"{field}: {shown(text)} is not a valid name", hint)
    return text


def parse_endpoint_address(text: str, field: str = "address") -> SocketAddress:
    """An endpoint's address; its port may be a range, or ``dynamic``."""
    return parse_socket_address(text, field, endpoint=True)


def parse_protocol(text: str, field: str = "protocol") -> Protocol:
    """tcp, udp, or any for both."""
    protocols = {"tcp": Protocol.TCP, "udp": Protocol.UDP, "any": ANY_PROTOCOL}
    if text not in protocols:
        raise UsageError(f"{field}: {shown(text)} is not a protocol", "tcp, udp or any")
    return protocols[text]


def parse_egress_protocol(text: str, field: str = "protocol") -> Protocol:
    """The same, or icmp."""
    if text == "icmp":
        return Protocol.ICMP
    try:
        return parse_protocol(text, field)
    except UsageError as error:
        raise UsageError(error.message, "tcp, udp, any or icmp") from None


def parse_netns(text: str, field: str = "netns") -> str:
    """``text`` itself, if it can name a network namespace: a name, a pid, or an absolute path."""
    is_path = text.startswith("/") and "\0" not in text and len(text.encode(errors="replace")) <= _PATH_MAX
    is_name = _NETNS_NAME.fullmatch(text) and text not in (".", "..")
    if not (is_path or is_name):
        raise UsageError(f"{field}: {shown(text)} is not a network namespace", "a name, a pid, or an absolute path")
    return text


def parse_ingress_flag(text: str, field: str = "-i") -> tuple[BindPattern, str]:
    """``ADDR:PORT[-PORT]=ENDPOINT`` of `graft run -i`."""
    pattern, name = _split_flag(text, field, "ADDR:PORT[-PORT]=ENDPOINT, such as 0.0.0.0:80=nx4")
    return parse_bind_pattern(pattern, field), parse_name(name, field)


def parse_egress_flag(text: str, field: str = "-e") -> tuple[Prefix, str]:
    """``PREFIX=ENDPOINT`` of `graft run -e`."""
    prefix, name = _split_flag(text, field, "PREFIX=ENDPOINT, such as 0.0.0.0/0=out4")
    return parse_prefix(prefix, field), parse_name(name, field)


def _split_flag(text: str, field: str, hint: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise UsageError(f"{field}: {shown(text)} is not a rule", hint)
    return left, right
