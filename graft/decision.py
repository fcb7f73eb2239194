"""Where should this socket live? A pure function from a trapped call to what is to be done.

    bind      rule, in the container         -> a twin in the host's stack, bound there, takes its place
    connect   rule, in the container         -> a twin takes its place, and the call goes on with it
    either    no rule, in the host's stack   -> back to the container, if it is not bound
    listen    in the host's stack, unbound   -> refused: a port would be picked that nobody granted
    all else                                 -> the call goes on; the hooks decide

What was read from the program's memory is a hint: the program may change it until the kernel copies it. A
wrong guess here leads to a refusal by the hooks, never to an address that was not granted.
"""

from __future__ import annotations

import enum
import errno
import socket
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from graft.layout import ENDPOINT_DUAL_STACK, Home
from graft.policy import Default, Verdict

TCP_CLOSE = 7  # include/net/tcp_states.h: neither connected, nor connecting, nor listening
_MAPPED = bytes(10) + b"\xff\xff"


class Call(enum.IntEnum):
    """The trapped system calls (GRAFT_CALL_*)."""

    BIND = 0
    CONNECT = 1
    LISTEN = 2


class Sockaddr(NamedTuple):
    """An address from a program's memory, IPv4-mapped ones made IPv4, as the hooks do. 16 bytes, host-order port."""

    family: int
    address: bytes
    port: int
    mapped: bool = False

    @property
    def ip(self) -> str:
        """The address as text."""
        if self.family == 4:
            return socket.inet_ntop(socket.AF_INET, self.address[:4])
        return socket.inet_ntop(socket.AF_INET6, self.address)

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}" if self.family == 4 else f"[{self.ip}]:{self.port}"


@lru_cache(maxsize=1024)
def parse_sockaddr(raw: bytes) -> Sockaddr | None:
    """struct sockaddr_in or sockaddr_in6 (ip(7), ipv6(7)); None for anything else, or too little of it."""
    if len(raw) < 8:
        return None
    kind = int.from_bytes(raw[:2], "little" if _LITTLE else "big")
    port = raw[2] << 8 | raw[3]
    if kind == socket.AF_INET:
        return Sockaddr(4, raw[4:8] + bytes(12), port)
    if kind != socket.AF_INET6 or len(raw) < 24:
        return None
    address = raw[8:24]
    if address.startswith(_MAPPED):
        return Sockaddr(4, address[12:] + bytes(12), port, mapped=True)
    return Sockaddr(6, address, port)


_LITTLE = struct.pack("=H", 1) == b"\x01\x00"


class Facts(NamedTuple):
    """What the hooks say of the socket that a call is about, in the order of struct desk (bpf/graft.h).

    Namespaces are cookies. ``endpoint`` is the id of the one that a rule names, ``verdict`` that rule's.
    ``local_port`` is 0 where the socket has none; ``bound`` says that it stands at an endpoint that is granted now.
    """

    netns: int
    container_netns: int
    endpoint_netns: int
    endpoint: int
    local_port: int
    answered: int
    home: int
    family: int
    state: int
    bound: int
    verdict: int
    endpoint_family: int
    bind_default: int
    connect_default: int
    protocol: int
    endpoint_flags: int

    @property
    def endpoint_is_ipv6_only(self) -> bool:
        """Whether a socket that is bound to the endpoint may not have its IPv4 port too."""
        return self.endpoint_family == 6 and not self.endpoint_flags & ENDPOINT_DUAL_STACK


class Action(enum.Enum):
    """What is to be done with a trapped call."""

    RESUME = "resume"
    TO_HOST = "to host"
    TO_CONTAINER = "to container"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """An action; TO_HOST with an endpoint's id and its namespace's cookie, REFUSE with an errno.

    ``v6only``: the twin takes no IPv4, whatever the socket does.
    """

    action: Action
    endpoint: int = 0
    netns: int = 0
    error: int = 0
    v6only: bool = False


RESUME = Decision(Action.RESUME)
_TO_CONTAINER = Decision(Action.TO_CONTAINER)
_REFUSED = Decision(Action.REFUSE, error=errno.EACCES)


@lru_cache(maxsize=1024)
def decide(call: Call, address: Sockaddr | None, facts: Facts, v6only: bool = False) -> Decision:
    """What to do with ``call``. ``v6only``: the socket is an IPv6 one that takes no IPv4."""
    if facts.state != TCP_CLOSE:
        return RESUME
    if facts.home == Home.CONTAINER and facts.netns != facts.container_netns:
        return RESUME  # of a namespace that the program made itself, or was handed
    if call is Call.LISTEN:
        return _REFUSED if facts.home == Home.HOST and not facts.bound else RESUME
    if address is None or not _fits(address, facts.family):
        return RESUME
    if call is Call.BIND:
        return _decide_bind(address, facts, v6only)
    return _decide_connect(facts)


def _fits(address: Sockaddr, family: int) -> bool:
    """Whether a socket of ``family`` can have the address at all; if not, the kernel says so."""
    return (address.family == 6 or address.mapped) == (family == 6)


def _decide_bind(address: Sockaddr, facts: Facts, v6only: bool) -> Decision:
    if facts.local_port:
        return RESUME  # bound already: the kernel's EINVAL
    # An IPv6-only socket cannot have an IPv4 endpoint.
    if facts.endpoint and not (facts.endpoint_family == 4 and address.family == 6 and v6only):
        only = facts.endpoint_is_ipv6_only and facts.family == 6
        if facts.home == Home.HOST and facts.endpoint_netns == facts.netns and (v6only or not only):
            return RESUME
        return Decision(Action.TO_HOST, facts.endpoint, facts.endpoint_netns, v6only=only)
    return _without_rule(facts, facts.bind_default)


def _decide_connect(facts: Facts) -> Decision:
    if facts.verdict == Verdict.DENY:
        return _REFUSED
    if facts.verdict == Verdict.GRANT:
        if facts.home == Home.HOST and (facts.endpoint_netns == facts.netns or facts.bound):
            return RESUME
        return Decision(Action.TO_HOST, facts.endpoint, facts.endpoint_netns)
    return _without_rule(facts, Default.CONTAINER if facts.verdict == Verdict.CONTAINER else facts.connect_default)


def _without_rule(facts: Facts, default: int) -> Decision:
    if facts.home == Home.CONTAINER:
        return RESUME  # it stays where it is, and the hooks know the default
    if facts.bound or default == Default.DENY:
        return _REFUSED
    return _TO_CONTAINER
