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
from typing import Protocol as Interface

from graft.layout import Home
from graft.policy import Default, Verdict

TCP_CLOSE = 7  # include/net/tcp_states.h: neither connected, nor connecting, nor listening
_IPPROTO_TCP = 6
_MAPPED = bytes(10) + b"\xff\xff"


class Call(enum.Enum):
    """The trapped system calls."""

    BIND = "bind"
    CONNECT = "connect"
    LISTEN = "listen"


@dataclass(frozen=True, slots=True)
class Sockaddr:
    """An address from a program's memory, IPv4-mapped ones made IPv4, as the hooks do. 16 bytes, host-order port."""

    family: int
    address: bytes
    port: int
    mapped: bool = False

    def __str__(self) -> str:
        size, kind = (4, socket.AF_INET) if self.family == 4 else (16, socket.AF_INET6)
        text = socket.inet_ntop(kind, self.address[:size])
        return f"{text}:{self.port}" if self.family == 4 else f"[{text}]:{self.port}"


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


@dataclass(frozen=True, slots=True)
class Facts:
    """What the kernel says of the socket that a call is about.

    ``netns`` is the cookie of the namespace it is in, ``local_port`` 0 where it is not bound, ``bound``
    whether it holds a granted endpoint.
    """

    home: Home
    family: int
    netns: int
    state: int
    local_port: int
    bound: bool
    v6only: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """A container as the maps have it."""

    ruleset: int
    netns: int
    bind_default: int
    connect_default: int


class Lookups(Interface):
    """What graft.rules.Lookup answers, and the parts of an endpoint that matter here."""

    def ingress(self, ruleset: int, protocol: int, family: int, address: bytes, port: int) -> int:
        """The id of the endpoint that a bind becomes, 0 for none."""
        ...

    def egress(self, ruleset: int, protocol: int, family: int, address: bytes, port: int) -> tuple[int, int]:
        """(verdict, id of the source endpoint) of a destination."""
        ...

    def endpoint(self, number: int) -> tuple[int, int] | None:
        """(family, cookie of the namespace) of an endpoint, None where it is gone."""
        ...


class Action(enum.Enum):
    """What is to be done with a trapped call."""

    RESUME = "resume"
    TO_HOST = "to host"
    TO_CONTAINER = "to container"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """An action; TO_HOST with an endpoint's id and its namespace's cookie, REFUSE with an errno."""

    action: Action
    endpoint: int = 0
    netns: int = 0
    error: int = 0


RESUME = Decision(Action.RESUME)
_TO_CONTAINER = Decision(Action.TO_CONTAINER)
_REFUSED = Decision(Action.REFUSE, error=errno.EACCES)


def decide(call: Call, address: Sockaddr | None, facts: Facts, rules: Rules, lookups: Lookups) -> Decision:
    """What to do with ``call``. The socket is a TCP socket of the container's namespace, or host-homed."""
    if facts.state != TCP_CLOSE:
        return RESUME
    if call is Call.LISTEN:
        return _REFUSED if facts.home is Home.HOST and not facts.bound else RESUME
    if address is None or (address.mapped and facts.family == 4) or (address.family == 6 and facts.family == 4):
        return RESUME
    if facts.family == 6 and address.family == 4 and not address.mapped:
        return RESUME
    if call is Call.BIND:
        return _decide_bind(address, facts, rules, lookups)
    return _decide_connect(address, facts, rules, lookups)


def _decide_bind(address: Sockaddr, facts: Facts, rules: Rules, lookups: Lookups) -> Decision:
    if facts.local_port:
        return RESUME  # bound already: the kernel's EINVAL
    number = lookups.ingress(rules.ruleset, _IPPROTO_TCP, address.family, address.address, address.port)
    found = lookups.endpoint(number) if number else None
    if found is not None and found[0] == 4 and address.family == 6 and facts.v6only:
        found = None  # an IPv6-only socket cannot have an IPv4 endpoint
    if found is not None:
        if facts.home is Home.HOST and found[1] == facts.netns:
            return RESUME
        return Decision(Action.TO_HOST, number, found[1])
    return _without_rule(facts, rules.bind_default)


def _decide_connect(address: Sockaddr, facts: Facts, rules: Rules, lookups: Lookups) -> Decision:
    verdict, number = lookups.egress(rules.ruleset, _IPPROTO_TCP, address.family, address.address, address.port)
    if verdict == Verdict.DENY:
        return _REFUSED
    found = lookups.endpoint(number) if verdict == Verdict.GRANT else None
    if found is not None:
        if facts.home is Home.HOST and (found[1] == facts.netns or facts.bound):
            return RESUME
        return Decision(Action.TO_HOST, number, found[1])
    return _without_rule(facts, Default.CONTAINER if verdict == Verdict.CONTAINER else rules.connect_default)


def _without_rule(facts: Facts, default: int) -> Decision:
    if facts.home is Home.CONTAINER:
        return RESUME  # it stays where it is, and the hooks know the default
    if facts.bound or default == Default.DENY:
        return _REFUSED
    return _TO_CONTAINER
