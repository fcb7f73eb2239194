"""The kernel's socket diagnostics: the sockets of a network namespace listed, and closed. The only module that asks.

Sources: sock_diag(7), netlink(7), include/uapi/linux/inet_diag.h and sock_diag.h; net/ipv4/inet_diag.c.

pyroute2's DiagSocket (0.9) is not used: it sends no request attributes (so no socket storage and no MPTCP), sends no
SOCK_DESTROY, and does not report the kernel's errors. graftd lists the listeners of each container several times a
second, over one netlink socket, which is kept open, because it belongs to the namespace that it was made in.

A listing takes no socket's lock, as long as it does not request tcp_info. Closing a socket takes its lock, and may
never return (graft/state/helper_process.py).

The kernel goes on with a listing where it was in a hash bucket by going through that from its start. So a bucket takes
time by the square of the number of its sockets, and any user of the host decides how many those are: UDP sockets at one
port, TCP sockets that are only bound at one address, TCP connections whose ports he chooses by the table's secret,
which the order of /proc/net/tcp shows (inet_diag_dump_icsk takes 16 of them at a time, udp_dump what fits into a
message). With code that accepts only sockets of some cgroups, one pass lists all. The bound are listed apart
(`BOUND_STATE`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_ONE, _REQUEST_DUMP, _REQUEST_ACK = 0x1, 0x1 | 0x300, 0x1 | 0x4
_TCP_ESTABLISHED, _TCP_SYN_RECV, _TCP_CLOSE, _TCP_LISTEN, _TCP_NEW_SYN_RECV = 1, 3, 7, 10, 12
_THE_KERNEL = 0  # its port id (netlink(7))
_PIECE_BYTES = 8192  # enough for one message of any page size (NLMSG_GOODSIZE): 65 listeners
_LARGE_BYTES = 1 << 16
_EVERY_STATE = 0xFFFFFFFF
BOUND_STATE = 1 << 13
"""TCPF_BOUND_INACTIVE (6.8): TCP sockets that are bound, and neither listen nor connect."""
OPEN_STATES = _EVERY_STATE & ~BOUND_STATE
_NO_COOKIE = b"\xff" * 8  # INET_DIAG_NOCOOKIE
IPPROTO_MPTCP = 262
# INET_DIAG_*: attributes of a listed socket; the last since 5.9
_SKV6ONLY, _SK_BPF_STORAGES, _CGROUP_ID = 11, 20, 21
# INET_DIAG_REQ_* and SK_DIAG_BPF_STORAGE_*: attributes of a request: which sockets, a socket storage (5.7), a protocol
# over 255 (5.10)
_REQUEST_BYTECODE, _REQUEST_STORAGES, _REQUEST_PROTOCOL = 1, 2, 3
_STORAGE_MAP, _STORAGE_VALUE = 1, 3
_NESTED = 0x8000

_HEADER = struct.Struct("=IHHII")
# struct inet_diag_req_v2: family, protocol, extensions, -, states; struct inet_diag_sockid
_REQUEST = struct.Struct("=BBBBI48s")
# struct inet_diag_msg: family, state, timer, retrans; ports in network order; addresses; interface; cookie; ...
_MESSAGE = struct.Struct("=BBBB2s2s16s16sIII5I")
_IDENTITY = slice(4, 52)  # the struct inet_diag_sockid in it, as a request names a socket
_REMOTE_PORT = slice(2, 4)  # in that
_COOKIE, _INODE = slice(44, 52), slice(68, 72)
_ATTRIBUTE = struct.Struct("=HH")
_NUMBER = struct.Struct("=I")
_TRIES = 4096
_MAX_AT = 1024  # listeners at one address
_NO_PORT = 0  # of the remote end: no connection has it
_LO = 1  # LOOPBACK_IFINDEX (net/flow.h), of each namespace
# struct inet_diag_bc_op: code, where to go on if so, and if not; struct inet_diag_hostcond: family, prefix, -, port
_OPERATION = struct.Struct("=BBH")
_HOST = struct.Struct("=BB2xi")
_BC_JMP, _BC_S_COND, _BC_CGROUP_COND, _ANY_PORT = 1, 7, 13, -1  # the third since 5.9
_CGROUPS_AT_ONCE = 512  # "where to go on" is of 16 bits


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """A listening TCP socket, or a UDP socket that has a port.

    ``address`` as in the maps; ``cgroup`` is 0 where the kernel does not report it; ``connected``: it has a peer, at
    ``peer`` and ``peer_port``; ``unread``: of UDP, the memory of what it has not read yet. ``stored`` is its value in
    the requested socket storage. ``asked`` is for a caller that knows what address its program bound: (family, address,
    port) of that, None for the same.
    """

    family: int
    address: bytes
    port: int
    v6only: bool
    cgroup: int
    device: int
    inode: int = 0
    stored: bytes | None = None
    asked: tuple[int, bytes, int] | None = None
    protocol: int = socket.IPPROTO_TCP
    connected: bool = False
    peer_port: int = 0
    peer: bytes = bytes(16)
    unread: int = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """What identifies a socket in its namespace: ``sockid`` is a struct inet_diag_sockid."""

    family: int
    protocol: int
    sockid: bytes

    @property
    def cookie(self) -> bytes:
        """The socket's own number, not used again while the machine is up."""
        return self.sockid[-8:]


@dataclass(frozen=True, slots=True)
class FoundSocket:
    """A socket of any state; ``stored`` is its value in the requested socket storage, None without one.

    (The kernel reports no storage of UDP sockets, see inet_sk_diag_fill().) Addresses and ports are (packed address,
    port); ``cgroup`` is the id of the cgroup that it was created in.
    """

    identity: Identity
    state: int
    local: tuple[bytes, int]
    remote: tuple[bytes, int]
    inode: int
    cgroup: int
    stored: bytes | None


class Diagnostics:
    """A netlink socket of one namespace, in which it must be made. Not usable after an OSError."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._sock.setblocking(False)  # the kernel makes each piece while the one before it is received
        # A user with CAP_NET_ADMIN over the namespace, such as a container's root, may send forged answers. A socket
        # that is connected to the kernel receives from no other sender (netlink_getsockbyportid, af_netlink.c).
        self._sock.connect((_THE_KERNEL, 0))

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()

    def listeners(self, storage: int | None = None) -> Iterator[list[ListeningSocket]]:
        """Every listening TCP socket of the namespace, some at a time, with its value in a socket storage map (see
        `sockets`); must be read to the end. Raises OSError.
        """
        for family in (socket.AF_INET, socket.AF_INET6):
            for piece in self._dump(family, socket.IPPROTO_TCP, 1 << _TCP_LISTEN, _PIECE_BYTES, storage):
                with _refusing():
                    found = [parse_listener(message) for message in piece]
                yield found

    def far_end(self, sock: socket.socket) -> FoundSocket | None:
        """The other end of a connection within the namespace, of which ``sock`` is one; None where nobody has accepted
        it (a listener is found then, or a connection request). Raises OSError.
        """
        remote, local = sock.getpeername(), sock.getsockname()
        ends = [socket.inet_pton(sock.family, one[0]).ljust(16, b"\0") for one in (remote, local)]
        one = self._one(sock.family, struct.pack("!HH", remote[1], local[1]) + ends[0] + ends[1] + bytes(4))
        return None if one is None or one.state in (_TCP_LISTEN, _TCP_NEW_SYN_RECV, _TCP_SYN_RECV) else one

    def chosen_at(self, family: int, address: str, port: int) -> FoundSocket | None:
        """The listener that the kernel chooses now for a connection over lo to that address; None where there is none.
        Raises OSError.
        """
        end = socket.inet_pton(family, address).ljust(16, b"\0")
        return self._one(family, struct.pack("!HH", port, _NO_PORT) + end + end + _NUMBER.pack(_LO))

    def _one(self, family: int, place: bytes) -> FoundSocket | None:
        """The TCP socket that would receive a packet; ``place`` is a struct inet_diag_sockid without the cookie."""
        self._send(
            _SOCK_DIAG_BY_FAMILY,
            _REQUEST_ONE,
            _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0, place + _NO_COOKIE),
        )
        try:
            with _refusing():
                found, _ = _answered(self._sock.recv(_PIECE_BYTES))
                return parse_socket(socket.IPPROTO_TCP, found[0]) if found else None
        except FileNotFoundError:
            return None

    def listeners_at(self, family: int, address: str, port: int, every: bool = True) -> Iterator[list[ListeningSocket]]:
        """Every listener of the namespace that a connection to that address may reach, some at a time: several with
        SO_REUSEPORT, of which a program that one of them has set may choose any. Not usable any more unless read to the
        end. Without ``every`` those at [::] are left out of an IPv4 address's.

        Raises OSError: EMSGSIZE where there are very many, also of those at [::] that an IPv4 connection cannot reach.
        """
        packed = socket.inet_pton(family, address)
        places = [(socket.AF_INET6, [packed, bytes(16)])]
        if family == socket.AF_INET:
            mapped = bytes(10) + b"\xff\xff"
            places = [
                (socket.AF_INET, [packed, bytes(4)]),
                (socket.AF_INET6, [mapped + packed, mapped + bytes(4), *([bytes(16)] if every else [])]),
            ]
        for kind, addresses in places:
            code, count = _at_one_of(kind, addresses), 0
            for piece in self._dump(kind, socket.IPPROTO_TCP, 1 << _TCP_LISTEN, _PIECE_BYTES, port=port, code=code):
                count += len(piece)
                if count > _MAX_AT:
                    raise OSError(errno.EMSGSIZE, f"more than {_MAX_AT} sockets listen at {address}, port {port}")
                with _refusing():
                    found = [parse_listener(message) for message in piece]
                yield [one for one in found if family != socket.AF_INET or not one.v6only]

    def datagram_sockets(self) -> Iterator[list[ListeningSocket]]:
        """Every UDP socket of the namespace, likewise; none where the kernel does not list them."""
        states = 1 << _TCP_ESTABLISHED | 1 << _TCP_CLOSE
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(FileNotFoundError):
                for piece in self._dump(family, socket.IPPROTO_UDP, states, _PIECE_BYTES):
                    with _refusing():
                        found = [replace(parse_listener(message), protocol=socket.IPPROTO_UDP) for message in piece]
                    yield found

    def sockets(
        self,
        protocol: int,
        storage: int,
        prefix: bytes = b"",
        cgroups: Iterable[int] | None = None,
        seconds: float | None = None,
    ) -> list[FoundSocket]:
        """Every socket of a protocol, with its value in the socket storage map ``storage`` (a descriptor); none that is
        only bound.

        With a ``prefix`` only those whose value begins with that: quick, as the others are not parsed. ``cgroups``:
        only those that were made in one of these. Empty for a protocol without diagnostics in this kernel. Raises
        OSError, TimeoutError where it takes longer than ``seconds``: not usable any more then.
        """
        found: list[FoundSocket] = []
        until = None if seconds is None else time.monotonic() + seconds
        with _refusing():
            for piece in self._pieces(protocol, storage, OPEN_STATES, cgroups):
                found += [parse_socket(protocol, message) for message in piece if prefix in message]
                if until is not None and time.monotonic() > until:
                    raise TimeoutError(errno.ETIMEDOUT, "sock_diag: too many sockets to be listed in time")
        return [one for one in found if not prefix or (one.stored or b"").startswith(prefix)]

    def messages(
        self, protocol: int, storage: int, states: int = OPEN_STATES, cgroups: Iterable[int] | None = None
    ) -> list[bytes]:
        """Every socket of a protocol, as `sockets` has it, not parsed: what anybody has very many of costs little then.

        ``cgroups``: only those that were made in one of these. `seen` and `parse_socket` read one. Raises OSError.
        """
        return [message for piece in self._pieces(protocol, storage, states, cgroups) for message in piece]

    def _pieces(self, protocol: int, storage: int, states: int, cgroups: Iterable[int] | None) -> Iterator[list[bytes]]:
        for code in [b""] if cgroups is None else _in_one_of(sorted(cgroups)):
            for family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(FileNotFoundError):
                    yield from self._dump(family, protocol, states, _LARGE_BYTES, storage, code=code)

    def destroy(self, one: Identity, shared: bool = False) -> None:
        """Close a socket: a connection is reset, a listener stops listening. Needs CAP_NET_ADMIN, takes its lock.

        ``shared``: others may have the same address (SO_REUSEPORT). The kernel chooses among them by the remote end, so
        remote ports are tried until it chooses this socket. Raises OSError: ENOENT where the socket is not
        found, EOPNOTSUPP for a kernel without CONFIG_INET_DIAG_DESTROY.
        """
        for port in range(_TRIES if shared else 1):
            sockid = bytearray(one.sockid)
            if port:
                sockid[_REMOTE_PORT] = port.to_bytes(2, "big")
            try:
                return self._destroy(one, bytes(sockid))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _destroy(self, one: Identity, sockid: bytes) -> None:
        body = _REQUEST.pack(one.family, one.protocol, 0, 0, _EVERY_STATE, sockid)
        self._send(_SOCK_DESTROY, _REQUEST_ACK, body)
        _answered(self._sock.recv(_LARGE_BYTES))

    def _dump(
        self,
        family: int,
        protocol: int,
        states: int,
        at_once: int,
        storage: int | None = None,
        port: int = 0,
        code: bytes = b"",
    ) -> Iterator[list[bytes]]:
        """The messages of a listing, ``at_once`` bytes at a time. No other request may be sent until its end. ``port``:
        only of sockets at that one; ``code``: of those that it accepts (`_at_one_of`).
        """
        body = _REQUEST.pack(family, min(protocol, 255), 0, 0, states, port.to_bytes(2, "big") + bytes(46))
        if protocol > 255:
            body += _attribute(_REQUEST_PROTOCOL, _NUMBER.pack(protocol))
        if code:
            body += _attribute(_REQUEST_BYTECODE, code)
        if storage is not None:
            body += _attribute(_REQUEST_STORAGES | _NESTED, _attribute(_STORAGE_MAP, _NUMBER.pack(storage)))
        self._send(_SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, body)
        is_last = False
        while not is_last:
            piece, is_last = _answered(self._sock.recv(at_once))
            yield piece

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body)


def _at_one_of(family: int, addresses: Sequence[bytes]) -> bytes:
    """Code for the kernel that accepts sockets at one of the addresses. (A prefix of 0 would be any address.)"""
    return _one_of(_BC_S_COND, [_HOST.pack(family, 8 * len(packed), _ANY_PORT) + packed for packed in addresses])


def _in_one_of(cgroups: Sequence[int]) -> list[bytes]:
    """Codes each of which accepts the sockets that were made in some of the cgroups."""
    packed = [number.to_bytes(8, sys.byteorder) for number in cgroups]
    starts = range(0, len(packed), _CGROUPS_AT_ONCE)
    return [_one_of(_BC_CGROUP_COND, packed[start : start + _CGROUPS_AT_ONCE]) for start in starts]


def _one_of(condition: int, operands: Sequence[bytes]) -> bytes:
    """Code for the kernel that accepts where the condition holds with one operand (inet_diag_bc_run, inet_diag.c).

    It accepts at its very end, and refuses 4 bytes after that. Each condition but the last has a jump to the end behind
    it; where it does not hold, it goes on 4 bytes further, with the next one.
    """
    code = b""
    for operand in reversed(operands):
        if code:
            code = _OPERATION.pack(_BC_JMP, _OPERATION.size, _OPERATION.size + len(code)) + code
        size = _OPERATION.size + len(operand)
        code = _OPERATION.pack(condition, size, size + 4) + operand + code
    return code


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn the ValueError for a malformed answer into an OSError."""
    try:
        yield
    except ValueError as error:
        raise OSError(errno.EBADMSG, f"sock_diag: {error}") from error


def _answered(data: bytes) -> tuple[list[bytes], bool]:
    """The messages about sockets in ``data``, and whether the listing ends there. Raises OSError."""
    found: list[bytes] = []
    with _refusing():
        for kind, message in split_messages(data):
            if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                return found, True
            found.append(message)
    return found, False


def split_messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The netlink messages in ``data`` (netlink(7)): kind, and what follows the header.

    Raises ValueError for a malformed message, and OSError for an error message, unless that reports success.
    """
    offset = 0
    while offset + _HEADER.size <= len(data):
        size, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= size <= len(data) - offset:
            raise ValueError(f"a message of {size} bytes where {len(data) - offset} are left")
        message = data[offset + _HEADER.size : offset + size]
        code = int.from_bytes(message[:4], sys.byteorder, signed=True) if kind == _NLMSG_ERROR else 0
        if code:
            raise OSError(-code, f"sock_diag: {os.strerror(-code)}")
        yield kind, message
        offset += size + 3 & ~3


def parse_listener(message: bytes) -> ListeningSocket:
    """A listener from struct inet_diag_msg with its attributes. Raises ValueError where it is too short."""
    family, state, _timer, _retrans, port, peer, source, target, device, *rest = _fields(message)
    attributes = dict(_attributes(message, _MESSAGE.size))
    *_, queued, _unsent, _uid, inode = rest
    return ListeningSocket(
        family=4 if family == socket.AF_INET else 6,
        address=source[:4].ljust(16, b"\0") if family == socket.AF_INET else source,
        port=int.from_bytes(port, "big"),
        v6only=attributes.get(_SKV6ONLY, b"")[:1] not in (b"", b"\0"),
        cgroup=_cgroup(attributes),
        device=device,
        inode=inode,
        unread=queued,
        stored=_stored(attributes),
        connected=state == _TCP_ESTABLISHED,
        peer_port=int.from_bytes(peer, "big"),
        peer=target[:4].ljust(16, b"\0") if family == socket.AF_INET else target,
    )


def parse_socket(protocol: int, message: bytes) -> FoundSocket:
    """A socket of any state from the same structure. Raises ValueError."""
    family, state, _timer, _retrans, port, peer, source, target, _device, *rest = _fields(message)
    attributes = dict(_attributes(message, _MESSAGE.size))
    size = 4 if family == socket.AF_INET else 16
    return FoundSocket(
        identity=Identity(family, protocol, message[_IDENTITY]),
        state=state,
        local=(source[:size], int.from_bytes(port, "big")),
        remote=(target[:size], int.from_bytes(peer, "big")),
        inode=rest[-1],
        cgroup=_cgroup(attributes),
        stored=_stored(attributes),
    )


class Seen(NamedTuple):
    """What a message says at first sight. ``is_stored``: the socket has a value in the requested storage."""

    inode: int
    state: int
    cookie: bytes
    cgroup: int
    is_stored: bool


def seen(message: bytes) -> Seen:
    """A socket at first sight. Raises ValueError."""
    if len(message) < _MESSAGE.size:
        raise ValueError(f"a socket in {len(message)} bytes")
    attributes = dict(_attributes(message, _MESSAGE.size))
    inode = int.from_bytes(message[_INODE], sys.byteorder)
    return Seen(inode, message[1], message[_COOKIE], _cgroup(attributes), _SK_BPF_STORAGES in attributes)


def _cgroup(attributes: Mapping[int, bytes]) -> int:
    """The id of the cgroup that a socket was created in, 0 where the kernel does not report it."""
    return int.from_bytes(attributes.get(_CGROUP_ID, b"")[:8], sys.byteorder)


def _stored(attributes: Mapping[int, bytes]) -> bytes | None:
    """The value in the requested socket storage."""
    stored = None
    for _, one in _attributes(attributes.get(_SK_BPF_STORAGES, b""), 0):
        stored = dict(_attributes(one, 0)).get(_STORAGE_VALUE, stored)
    return stored


def _fields(message: bytes) -> tuple[Any, ...]:
    if len(message) < _MESSAGE.size:
        raise ValueError(f"a socket in {len(message)} bytes")
    return _MESSAGE.unpack_from(message)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(message: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _ATTRIBUTE.size <= len(message):
        size, kind = _ATTRIBUTE.unpack_from(message, offset)
        if size < _ATTRIBUTE.size:
            return
        yield kind & ~_NESTED, message[offset + _ATTRIBUTE.size : offset + size]
        offset += size + 3 & ~3
