"""The ferry of one container: brings datagrams from its sockets on the host's stack to its own namespace, and back.

Theory of operation

    socket on the host's stack ──▶ 127.254.x.y:R ─┐                       ┌─ a socket inside ◀──▶ peers inside
    (unconnected, port P)      ◀──  (or ::1:R)   ─┴──── this process ─────┴─ (port P where it is free)

The hooks lead here what a host-homed datagram socket sends to a destination that its policy leaves in the container,
and show the program who really sent what this process brings (bpf/ferry.bpf.c). An address of 127.254.0.0/16, or one of
a few ports at ::1, stands for a peer inside: its berth. For each socket there is a stand-in inside, with the same port
where nobody has it; so answers, and what others inside send there, find their way. It belongs to the user
who has that socket, and has no capability when it gets its port. Nothing that a stranger sends is received, and nothing
is delivered to a stranger: the hooks see to both.

All of it is bounded and ages: berths and stand-ins that were idle for a while are removed. A stand-in for a socket that
was bound (to no address and no port in particular) stays for as long as the container has a socket on the host's stack
that receives at that port.

One process for each container that has datagram sockets on the host's stack, in the cgroup of the supervisor that
started it. It ends with its container.
"""

from __future__ import annotations

import contextlib
import ctypes
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.kernel import cgroup
from graft.kernel.credentials import owning_files_as, with_capabilities
from graft.model.settings import Settings
from graft.model.transport import Home
from graft.state import ferries
from graft.state.records import Container
from graft.swap.berths import Berths, Peer
from graft.swap.ferry_owners import FerryOwners, HostSockets
from graft.swap.socket_pool import NamespaceSwitch

_SOL_IP, _SOL_IPV6 = 0, 41
_IP_PKTINFO, _IPV6_V6ONLY = 8, 26
_PKTINFO = struct.Struct("=I4s4s")
_LARGEST = 65535
_AT_ONCE = 64
"""Datagrams of one socket before the others are looked at."""

MAX_STAND_INS = 512
IDLE_SECONDS = 60.0
_SWEEP_SECONDS = 5.0

Source = tuple[int, str, int]
"""Of a socket on the host's stack: family (4, 6), its address towards the ferry, its port."""
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@dataclass(slots=True, eq=False)
class StandIn:
    """A socket inside, for one on the host's stack. ``bound``: that one was bound, and can be sent to first."""

    source: Source
    sock: socket.socket
    bound: bool
    used: float = field(default_factory=time.monotonic)


class Ferry:
    """All of one container's. ``listener`` is where its supervisors connect."""

    def __init__(
        self, settings: Settings, maps: Maps, container: Container, namespaces: NamespaceSwitch, listener: socket.socket
    ) -> None:
        self._container, self._namespaces, self._listener = container, namespaces, listener
        self._containers = maps.containers
        self._socket_path = ferries.socket_path(settings, container.id)
        ferries.reserve(maps, container.id)
        self._berths = Berths(maps.berths, container.id)
        self._selector = selectors.DefaultSelector()
        self._stand_ins: dict[Source, StandIn] = {}
        self._host4 = self._open4(maps)
        self._host6 = [self._open6(maps) for _ in range(layout.BERTHS6)]
        self._host_sockets = HostSockets(maps.tags, self._open_asking(maps))
        self._owners = FerryOwners(self._host_sockets)
        self._inside = namespaces.open(container.netns)
        ports6 = [one.getsockname()[1] if one else 0 for one in self._host6]
        value = layout.FerryValue(mark=ferries.new_mark(), port=self._host4.getsockname()[1])
        value.ports6[:] = ports6
        maps.ferries.put(ctypes.c_uint32(container.id), value)
        self._watch(listener, self._accept)
        self._watch(self._host4, self._from_host4)
        for place, one in enumerate(self._host6):
            if one is not None:
                self._watch(one, partial(self._from_host6, place))

    @property
    def descriptors(self) -> set[int]:
        """What this process needs besides the sockets in its selector."""
        sockets = {int(key.fd) for key in self._selector.get_map().values()}
        maps = {self._containers.fd, self._berths.map_fd}
        others = {self._selector.fileno(), self._inside, self._namespaces.host}
        return {*sockets, *maps, *others, *self._host_sockets.descriptors}

    def run(self) -> None:
        """Until the container has ended. Nothing is left of its places then, though it was busy when it was told."""
        try:
            self._run()
        finally:
            self._berths.clear()

    def _run(self) -> None:
        swept = time.monotonic()
        while self._selector is not None:
            for key, _ in self._selector.select(_SWEEP_SECONDS):
                if key.data(key.fileobj):
                    return
            if time.monotonic() - swept >= _SWEEP_SECONDS:
                swept = time.monotonic()
                if not self._has_container():
                    self._socket_path.unlink(missing_ok=True)
                    return
                self._sweep()

    def _has_container(self) -> bool:
        with contextlib.suppress(OSError):
            here = self._container.exists and cgroup.populated(self._container.cgroup_path)
            return here and self._containers.peek(ctypes.c_uint32(self._container.id)) is not None
        return False

    # ---- sockets on the host's loopback

    def _open4(self, maps: Maps) -> socket.socket:
        """All of 127.254.0.0/16 at one port. (Not tied to lo: the hook that looks for who receives there would not find
        it. And beside it another socket, tied to another interface, could have that port.)
        """
        sock = self._tagged(maps, socket.AF_INET)
        sock.setsockopt(_SOL_IP, _IP_PKTINFO, 1)
        sock.bind(("", 0))
        return sock

    def _open6(self, maps: Maps) -> socket.socket | None:
        with contextlib.suppress(OSError):  # a host without IPv6
            sock = self._tagged(maps, socket.AF_INET6)
            sock.setsockopt(_SOL_IPV6, _IPV6_V6ONLY, 1)
            sock.bind(("::1", 0))
            return sock
        return None

    def _open_asking(self, maps: Maps) -> dict[int, socket.socket]:
        found = {4: self._tagged(maps, socket.AF_INET)}
        with contextlib.suppress(OSError):  # a host without IPv6
            found[6] = self._tagged(maps, socket.AF_INET6)
        return found

    def _tagged(self, maps: Maps, family: int) -> socket.socket:
        """Before it has a port: the hooks keep strangers away from it."""
        sock = socket.socket(family, socket.SOCK_DGRAM)
        maps.tags.put(ctypes.c_int32(sock.fileno()), layout.Tag(container=self._container.id, home=Home.FERRY))
        sock.setblocking(False)
        return sock

    def _watch(self, sock: socket.socket, handle: Callable[[socket.socket], object]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, handle)

    # ---- requests

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._watch(listener.accept()[0], self._serve)

    def _serve(self, connection: socket.socket) -> bool:
        """One request; whether it was to end."""
        with contextlib.suppress(OSError, struct.error):
            request = connection.recv(64)
            if request[:1] == ferries.STAND_IN:
                port, *families = struct.unpack(ferries.STAND_IN_FORMAT, request[1:])
                for family, wanted in zip((4, 6), families, strict=True):
                    if wanted:
                        self._stand_in((family, _LOOPBACK[family], port), bound=True)
                connection.send(b"+")
                return False
            if request[:1] == ferries.OWNER:
                uid, gid = struct.unpack(ferries.OWNER_FORMAT, request[1:])
                self._owners.note((uid, gid))
                connection.send(b"+")
                return False
            if request[:1] == ferries.END:
                return True
        self._selector.unregister(connection)
        connection.close()
        return False

    # ---- from the host's stack

    def _from_host4(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_AT_ONCE):
                data, messages, _, source = sock.recvmsg(_LARGEST, 64)
                for level, kind, value in messages:
                    if (level, kind) == (_SOL_IP, _IP_PKTINFO):
                        to = int.from_bytes(_PKTINFO.unpack(value[: _PKTINFO.size])[2], "big")
                        if to & 0xFFFF0000 == layout.FERRY_NET:
                            self._send_inside((4, source[0], source[1]), to & 0xFFFF, data)

    def _from_host6(self, place: int, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_AT_ONCE):
                data, source = sock.recvfrom(_LARGEST)
                self._send_inside((6, source[0], source[1]), place, data)

    def _send_inside(self, source: Source, place: int, data: bytes) -> None:
        peer = self._berths.peer_at(source[0], place)
        stand_in = self._stand_in(source) if peer is not None else None
        if stand_in is None or peer is None:
            return
        stand_in.used = time.monotonic()
        with contextlib.suppress(OSError):
            stand_in.sock.sendto(data, (peer.address, peer.port))

    # ---- from inside

    def _from_inside(self, stand_in: StandIn) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_AT_ONCE):
                data, sender = stand_in.sock.recvfrom(_LARGEST)
                family, address, port = stand_in.source
                place = self._berths.place_of(Peer(family, sender[0].partition("%")[0], sender[1]))
                if place is None:
                    continue
                stand_in.used = time.monotonic()
                try:
                    self._send_to_host(family, place, data, (address, port))
                except PermissionError:  # the hook: the container has no socket there
                    self._remove(stand_in)
                    return

    def _send_to_host(self, family: int, place: int, data: bytes, to: tuple[str, int]) -> None:
        if family == 4:
            own = (layout.FERRY_NET | place).to_bytes(4, "big")
            self._host4.sendmsg([data], [(_SOL_IP, _IP_PKTINFO, _PKTINFO.pack(0, own, bytes(4)))], 0, to)
        else:
            sock = self._host6[place]
            if sock is not None:
                sock.sendto(data, to)

    # ---- stand-ins

    def _stand_in(self, source: Source, bound: bool = False) -> StandIn | None:
        """The one for that socket, made where there is none; None where there can be no more."""
        found = self._stand_ins.get(source)
        if found is None:
            found = self._make(source)
        if found is not None:
            found.bound |= bound
        return found

    def _make(self, source: Source) -> StandIn | None:
        if len(self._stand_ins) >= MAX_STAND_INS:
            self._sweep(idle=1.0)
        if len(self._stand_ins) >= MAX_STAND_INS:
            return None
        family, _, port = source
        owner = self._owners.of(*source)
        with self._namespaces.entered(self._inside), owning_files_as(*owner):
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setblocking(False)
        if family == 6:
            sock.setsockopt(_SOL_IPV6, _IPV6_V6ONLY, 1)
        for number in (port, 0):  # another one has it, or it is not for everybody: answers find this one all the same
            with contextlib.suppress(OSError), with_capabilities():
                sock.bind(("" if family == 4 else "::", number))
                break
        stand_in = self._stand_ins[source] = StandIn(source, sock, False)
        self._watch(sock, lambda _: self._from_inside(stand_in))
        return stand_in

    def _remove(self, stand_in: StandIn) -> None:
        self._selector.unregister(stand_in.sock)
        stand_in.sock.close()
        del self._stand_ins[stand_in.source]

    def _sweep(self, idle: float = IDLE_SECONDS) -> None:
        """Remove what was not used for a while, and stand-ins for bound sockets that are gone."""
        now = time.monotonic()
        self._berths.sweep(IDLE_SECONDS)
        for one in list(self._stand_ins.values()):
            if self._host_sockets.owner_at(*one.source) is None if one.bound else now - one.used > idle:
                self._remove(one)
