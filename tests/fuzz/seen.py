"""What was seen while a sequence ran: calls, sockets, packets, and which policies were in force when. Pure.

Times are nanoseconds of CLOCK_REALTIME: the calls', the packets' (the kernel's stamps) and the operator's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from ipaddress import ip_address

from tests.fuzz.model import World
from tests.fuzz.rules import plain

TCP, UDP, ICMP, IGMP, ICMP6 = 6, 17, 1, 2, 58
_HEADERS = (0, 43, 60)  # hop-by-hop, routing, destination options
_FRAGMENT = 44


@dataclass(frozen=True, slots=True)
class Event:
    """A call that was made. ``result``: a negative errno where it failed. ``cookie``: of the socket that the descriptor
    is afterwards (0: none), ``netns``: of that one's namespace.
    """

    thread: int
    by: str
    way: str
    words: tuple[str, ...]
    begin: int
    end: int
    result: int
    cookie: int
    netns: int

    @property
    def op(self) -> str:
        """The call's name."""
        return self.words[0]

    @property
    def went(self) -> bool:
        """Whether the call succeeded, or began to (a connect in progress)."""
        return self.result >= 0 or (self.op in ("connect", "send", "cmsg") and -self.result in (111, 115))

    @property
    def asked(self) -> tuple[str, int]:
        """The address of a bind, connect or send; ("", 0) where there is none."""
        if self.op not in ("bind", "connect", "send", "cmsg") or self.words[2] == "-":
            return "", 0
        return plain(self.words[2]), int(self.words[3])


def parse_event(calls: Several[str], line: str) -> Event:
    """The answer of fuzzing.c to one of ``calls``."""
    number, *numbers = map(int, line.split()[1:])
    thread, by, way, *words = calls[number].split()
    begin, end, result, cookie, netns = numbers
    return Event(int(thread), by, way, tuple(words), begin, end, result, cookie, netns)


@dataclass(frozen=True, slots=True)
class Stand:
    """A socket of the host's namespace as socket diagnostics show it. ``peer`` port 0: none."""

    protocol: int
    listens: bool
    own: tuple[str, int]
    peer: tuple[str, int]
    cookie: int
    inode: int


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet that left a socket of the host's namespace, by the network or over lo."""

    time: int
    protocol: int
    source: tuple[str, int]
    to: tuple[str, int]
    flags: int = 0
    number: int = 0
    odd: bool = False

    @property
    def opens(self) -> bool:
        """A SYN."""
        return self.protocol == TCP and self.flags & 0x12 == 0x02

    @property
    def answers(self) -> bool:
        """A SYN with ACK: a listener answers."""
        return self.protocol == TCP and self.flags & 0x12 == 0x12


def parse_packet(data: bytes, time: int) -> Packet | None:
    """An IP packet with its header; None for what is none, for fragments but the first, and what is cut off."""
    try:
        return _parse4(data, time) if data[0] >> 4 == 4 else _parse6(data, time) if data[0] >> 4 == 6 else None
    except (IndexError, struct.error):
        return None


def _parse4(data: bytes, time: int) -> Packet | None:
    size = (data[0] & 15) * 4
    if struct.unpack_from(">H", data, 6)[0] & 0x1FFF:
        return None
    return _transport(data[size:], time, data[9], str(ip_address(data[12:16])), str(ip_address(data[16:20])), size > 20)


def _parse6(data: bytes, time: int) -> Packet | None:
    following, rest, odd = data[6], data[40:], False
    while following in _HEADERS or following == _FRAGMENT:
        odd = odd or following != _FRAGMENT
        if following == _FRAGMENT and struct.unpack_from(">H", rest, 2)[0] & 0xFFF8:
            return None
        following, rest = rest[0], rest[8 if following == _FRAGMENT else 8 * (rest[1] + 1) :]
    return _transport(rest, time, following, str(ip_address(data[8:24])), str(ip_address(data[24:40])), odd)


def _transport(rest: bytes, time: int, protocol: int, source: str, to: str, odd: bool) -> Packet:
    source, to = plain(source), plain(to)
    if protocol == TCP:
        own, far, number = struct.unpack_from(">HHI", rest)
        return Packet(time, protocol, (source, own), (to, far), rest[13], number, odd)
    if protocol in (UDP, 136, 132):
        own, far = struct.unpack_from(">HH", rest)
        return Packet(time, protocol, (source, own), (to, far), odd=odd)
    return Packet(time, protocol, (source, 0), (to, 0), rest[0] if rest else 0, odd=odd)


@dataclass(frozen=True, slots=True)
class Datagram:
    """A datagram of the judge's own, and the socket that received it (``cookie``)."""

    time: int
    source: tuple[str, int]
    to: tuple[str, int]
    cookie: int


@dataclass(slots=True)
class Timeline:
    """Which worlds were in force when. While the operator changes one for another, both are."""

    spans: list[tuple[World, int, int | None]] = field(default_factory=list)

    def begin(self, world: World, time: int) -> None:
        """From ``time`` on this one may be in force, beside the one before."""
        self.spans.append((world, time, None))

    def replaced(self, time: int) -> None:
        """At ``time`` all but the last are certainly gone."""
        self.spans = [(one, begin, time if end is None else end) for one, begin, end in self.spans[:-1]] + self.spans[
            -1:
        ]

    def failed(self) -> None:
        """The last one never came into force."""
        self.spans.pop()

    def during(self, begin: int, end: int) -> Iterator[World]:
        """Those that were in force at any moment of a time."""
        return (one for one, since, until in self.spans if since <= end and (until is None or until >= begin))


@dataclass(frozen=True, slots=True)
class Observed:
    """All that the judge is shown. ``host``: the cookie of the host's namespace; ``addresses``: the host's own;
    ``since``: packets from before were judged already; ``groups``: multicast and anycast groups that were joined.
    """

    transport: str
    host: int
    addresses: frozenset[str]
    timeline: Timeline
    begun: int
    since: int
    ended: int
    events: tuple[Event, ...] = ()
    sockets: tuple[Stand, ...] = ()
    packets: tuple[Packet, ...] = ()
    received: tuple[Datagram, ...] = ()
    groups: tuple[str, ...] = ()
