"""What the kernel shows of the host's namespace: sockets, packets, group memberships. No code of Graft's.

Sources: sock_diag(7) and linux/inet_diag.h, packet(7), socket(7) for SO_TIMESTAMPNS and SO_COOKIE.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

from tests.fuzz.judge import OWN_PORTS
from tests.fuzz.rules import is_any, plain
from tests.fuzz.seen import TCP, UDP, Datagram, Packet, Stand, parse_packet
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns

_NETLINK_SOCK_DIAG, _BY_FAMILY, _DUMP, _DONE, _ERROR = 4, 20, 0x301, 3, 2
_LISTEN, _TIME_WAIT = 10, 6
_SO_TIMESTAMPNS = 35
_OUTGOING = 4
_PACKET_STATISTICS = 6


class Diagnostics:
    """The sockets of a namespace, of all processes."""

    def __init__(self, netns: Netns) -> None:
        with netns.inside():
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)

    def close(self) -> None:
        """Done."""
        self._netlink.close()

    def sockets(self) -> tuple[Stand, ...]:
        """All sockets that a process has open, except the judge's own."""
        found = (one for protocol in (TCP, UDP, 136) for family in (2, 10) for one in self._dump(family, protocol))
        return tuple(one for one in found if one.inode and one.own[1] not in OWN_PORTS)

    def _dump(self, family: int, protocol: int) -> Iterator[Stand]:
        request = struct.pack("=BBBBI", family, protocol, 0, 0, 0xFFFFFFFF) + bytes(48)
        self._netlink.send(struct.pack("=IHHII", 16 + len(request), _BY_FAMILY, _DUMP, 1, 0) + request)
        while True:
            data = self._netlink.recv(1 << 16)
            while len(data) >= 16:
                size, kind = struct.unpack_from("=IH", data)
                if kind in (_DONE, _ERROR):
                    return
                yield _stand(protocol, data[16:size])
                data = data[(size + 3) & ~3 :]


def _stand(protocol: int, message: bytes) -> Stand:
    family, state = message[0], message[1]
    own, far = struct.unpack_from(">HH", message, 4)
    size = 4 if family == 2 else 16
    address, peer = (plain(str(ip_address(message[at : at + size]))) for at in (8, 24))
    first, second = struct.unpack_from("=II", message, 44)
    inode = struct.unpack_from("=I", message, 68)[0]
    return Stand(
        protocol, protocol == TCP and state == _LISTEN, (address, own), (peer, far), first | second << 32,
        0 if state == _TIME_WAIT else inode,
    )  # fmt: skip


class Capture:
    """Packets that leave sockets of a namespace, on all of its interfaces."""

    def __init__(self, netns: Netns) -> None:
        with netns.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)

    def close(self) -> None:
        """Done."""
        self._socket.close()

    def packets(self) -> Iterator[Packet]:
        """The packets since the last call. Raises AssertionError where the kernel had to drop some."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, stamps, _, link = self._socket.recvmsg(256, 256, socket.MSG_DONTWAIT)
                found = (
                    parse_packet(data, _stamp(stamps)) if link[2] == _OUTGOING and link[1] in (0x800, 0x86DD) else None
                )
                if found:
                    yield found
        _, dropped = struct.unpack("=II", self._socket.getsockopt(263, _PACKET_STATISTICS, 8))
        assert not dropped, f"the capture lost {dropped} packets"


def _stamp(messages: Iterable[tuple[int, int, bytes]]) -> int:
    for level, kind, data in messages:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, rest = struct.unpack("=qq", data[:16])
            return int(seconds * 1_000_000_000 + rest)
    return time.time_ns()


def memberships(netns: Netns) -> frozenset[str]:
    """The groups that sockets have joined: IPv4 and IPv6 multicast, IPv6 anycast."""
    found = set()
    with netns.inside():
        for name in ("igmp", "igmp6", "anycast6"):
            interface = ""
            for line in Path("/proc/thread-self/net", name).read_text().splitlines():
                words = line.split()
                if name == "igmp":
                    interface = words[1] if not line.startswith("\t") else interface
                    found |= {f"{interface} {words[0]}"} if line.startswith("\t") else set()
                else:
                    found.add(f"{words[1]} {words[2]}")
    return frozenset(found)


class Stranger:
    """A client that no rule names: connects to listeners, and sends to datagram sockets."""

    def __init__(self, host: Netns, client: Netns) -> None:
        self._host, self._client = host, client
        self._sent: dict[str, Datagram] = {}
        self._number = 0
        self._port = OWN_PORTS.start

    def knock(self, stands: Iterable[Stand], seconds: float = 0.15) -> None:
        """Connect to each listener, from the network or (where it has an address of its own) from the host. Who answers
        is seen as a packet.
        """
        with ExitStack() as stack:
            waiting = []
            for address, port in sorted({to for stand in stands if stand.listens for to in _ways_to(stand)}):
                sock = self._socket(address, socket.SOCK_STREAM, stack)
                if sock.connect_ex((address, port)) == errno.EINPROGRESS:
                    waiting.append(sock)
            end = time.monotonic() + seconds
            while waiting and (left := end - time.monotonic()) > 0:
                _, ready, _ = select.select([], waiting, [], left)
                waiting = [one for one in waiting if one not in ready]

    def send(self, stands: Iterable[Stand]) -> None:
        """A datagram to each socket."""
        with ExitStack() as stack:
            for address, port in sorted({to for stand in stands if stand.protocol == UDP for to in _ways_to(stand)}):
                sock = self._socket(address, socket.SOCK_DGRAM, stack)
                self._number += 1
                text = f"probe-{self._number}"
                own = sock.getsockname()
                self._sent[text] = Datagram(time.time_ns(), (plain(own[0]), own[1]), (address, port), 0)
                with contextlib.suppress(OSError):
                    sock.sendto(text.encode(), (address, port))

    def got(self, line: str) -> Datagram:
        """What an answer `h COOKIE TEXT` of fuzzing.c is about."""
        _, cookie, text = line.split()
        sent = self._sent[text]
        return Datagram(sent.time, sent.source, sent.to, int(cookie))

    def _socket(self, to: str, kind: socket.SocketKind, stack: ExitStack) -> socket.socket:
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        outside = to in (HOST4, HOST6)
        with (self._client if outside else self._host).inside():
            made = stack.enter_context(socket.socket(family, kind))
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        own = {True: (CLIENT6, CLIENT4), False: ("::", "0.0.0.0")}[outside]
        if kind == socket.SOCK_DGRAM and not outside:
            own = to, to
        while True:
            self._port = self._port + 1 if self._port + 1 in OWN_PORTS else OWN_PORTS.start
            with contextlib.suppress(OSError):
                made.bind((own[0 if ":" in to else 1], self._port))
                return made


def _ways_to(stand: Stand) -> Iterator[tuple[str, int]]:
    address, port = stand.own
    if not port:
        return
    if is_any(address):
        yield HOST4, port
        if address == "::":
            yield HOST6, port
    elif not address.startswith(("fe80", "ff", "22")):
        yield address, port
