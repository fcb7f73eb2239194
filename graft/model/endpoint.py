"""Endpoints: named addresses of a network stack, and the flags of `graft run` that refer to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from ipaddress import IPv4Address, IPv6Address, ip_address

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
from graft.model.unix_socket import UnixSocket, is_unix, parse_path, parse_unix_socket

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

PROTOCOLS: dict[str, Protocol] = {one.label: one for one in IP_PROTOCOLS}
"""Each by its label: tcp, udp and icmp."""

PROTOCOL_LABELS: dict[int, str] = {number: one.label for one, number in IP_PROTOCOLS.items()}
"""Their labels by their numbers."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A named address of a network stack, the host's unless ``netns`` names another one.

    ``port`` 0 is dynamic: the kernel picks. ``netns`` is a name, a pid or a path, as the operator wrote
    it. ``open`` lets a container request it through its environment. An IPv6 endpoint accepts IPv6 clients only, unless
    it is ``dual_stack``. ``last_port``: it is a range of ports that begins at ``port``; 0: it is one. Sockets that are
    bound to it may join the groups in ``multicast``.

    One with ``unix`` is a unix socket of the host, which Graft relays TCP connections to or from; its address is then
    that of the relay (`unix_endpoint`).
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
    unix: UnixSocket | None = None

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
        """``ADDR:PORT`` or ``unix:/PATH``, as an operator writes it."""
        return self.unix.spec if self.unix is not None else self.spec_at(self.port, self.last_port)

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
    owner: str | None = None,
    mode: str | None = None,
) -> Endpoint:
    """The endpoint ``name`` at ``spec``: ``ADDR:PORT``, ``[ADDR6]:PORT``, port also FIRST-LAST, ``dynamic`` or 0;
    ``unix:/PATH``.

    Raises UsageError that names the field: name, address, protocol, netns, dual stack, multicast, owner or mode.
    """
    parse_name(name)
    if is_unix(spec):
        check_unix_options(parse_protocol(proto), netns, dual_stack, multicast)
        return unix_endpoint(name, parse_unix_socket(spec, owner, mode), open_)
    check_no_owner(owner, mode)
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


def unix_endpoint(name: str, unix: UnixSocket, open_: bool = False) -> Endpoint:
    """The endpoint of a unix socket. In the maps it has the host's loopback and a dynamic port: there a container that
    shares the host's namespace listens for Graft's relay (bpf/bind.bpf.c), and nobody else.
    """
    return Endpoint(name, IPv4Address("127.0.0.1"), 0, Protocol.TCP, open=open_, unix=unix)


def check_unix_options(protocols: Protocol, netns: str | None, dual_stack: bool, multicast: object) -> None:
    """Raises UsageError for what an endpoint of a unix socket cannot have."""
    if not protocols & Protocol.TCP:
        raise UsageError("protocol: a unix socket carries TCP connections, no datagrams", "tcp, or leave it out")
    if netns is not None:
        raise UsageError("netns: a unix socket is a file of the host, in no network namespace", "leave it out")
    if dual_stack:
        raise UsageError("dual stack: a unix socket has no IP address", "leave it out")
    if multicast:
        raise UsageError("multicast: a unix socket has no IP address", "leave it out")


def check_no_owner(owner: object, mode: object) -> None:
    """Raises UsageError where an endpoint at an IP address has an owner or a mode."""
    for field, value in (("owner", owner), ("mode", mode)):
        if value is not None:
            raise UsageError(f"{field}: only a unix socket has one", "leave it out, or unix:/PATH as the address")


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


def parse_unix_flag(text: str, field: str = "-i") -> tuple[str, str]:
    """``unix:/PATH=ENDPOINT`` of `graft run -i`."""
    path, name = _split_flag(text, field, "unix:/PATH=ENDPOINT, such as unix:/run/app.sock=app")
    return parse_path(path, field), parse_name(name, field)


def parse_egress_flag(text: str, field: str = "-e") -> tuple[Prefix, str]:
    """``PREFIX=ENDPOINT`` of `graft run -e`."""
    prefix, name = _split_flag(text, field, "PREFIX=ENDPOINT, such as 0.0.0.0/0=out4")
    return parse_prefix(prefix, field), parse_name(name, field)


def _split_flag(text: str, field: str, hint: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise UsageError(f"{field}: {shown(text)} is not a rule", hint)
    return left, right
