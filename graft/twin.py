"""A twin of a socket: the same in all that its program set or can see, in another network namespace.

The options that a program set are known by name from the setsockopt hook; their values are read from the
socket itself, so that a call which the kernel refused is not replayed with root's rights. They are set without
any capability, as an unprivileged program may (a congestion control that only root may choose, say, or a filter
that is compiled without the care that is taken with other users'), and only options of the table below: each does
nothing outside the socket. Numbers: asm-generic/socket.h, linux/tcp.h, linux/in.h, linux/in6.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from _socket import socket as Socket  # socket.socket's own base: a third of its cost to make and to close
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from graft.kernel.capabilities import CAP_NET_ADMIN
from graft.kernel.credentials import as_user, with_capabilities
from graft.layout import Options

AF_INET, AF_INET6, SOCK_STREAM = 2, 10, 1
SOL_IP, SOL_SOCKET, SOL_TCP, SOL_IPV6 = 0, 1, 6, 41

_SNDBUF, _RCVBUF, _SNDBUFFORCE, _RCVBUFFORCE = 7, 8, 32, 33
_PRIORITY, _ATTACH_FILTER, _LOCK_FILTER = 12, 26, 44
_TCP_CONGESTION = 13

# asm-generic/fcntl.h, linux/fcntl.h
_F_SETSIG, _F_GETSIG, _F_SETOWN_EX, _F_GETOWN_EX, _F_GETOWNER_UIDS = 10, 11, 15, 16, 17
IPV6_V6ONLY = 26

# Carried as they are: read here, written there. Names in the order of their numbers.
_PLAIN: dict[int, frozenset[int]] = {
    # REUSEADDR DONTROUTE BROADCAST KEEPALIVE OOBINLINE NO_CHECK LINGER REUSEPORT RCVLOWAT RCVTIMEO SNDTIMEO
    # TIMESTAMP TIMESTAMPNS TIMESTAMPING RXQ_OVFL PEEK_OFF SELECT_ERR_QUEUE MAX_PACING_RATE INCOMING_CPU
    # ZEROCOPY, the _NEW forms of the times, BUF_LOCK TXREHASH
    SOL_SOCKET: frozenset(
        {2, 5, 6, 9, 10, 11, 13, 15, 18, 20, 21, 29, 35, 37, 40, 42, 45, 47, 49, 60, 63, 64, 65, 66, 67, 72, 74}
    ),
    # NODELAY MAXSEG CORK KEEPIDLE KEEPINTVL KEEPCNT SYNCNT LINGER2 DEFER_ACCEPT WINDOW_CLAMP QUICKACK CONGESTION
    # THIN_LINEAR_TIMEOUTS THIN_DUPACK USER_TIMEOUT FASTOPEN TIMESTAMP NOTSENT_LOWAT SAVE_SYN FASTOPEN_CONNECT
    # FASTOPEN_KEY FASTOPEN_NO_COOKIE INQ TX_DELAY, and the RTO limits of newer kernels
    SOL_TCP: frozenset(
        {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 17, 18, 23, 24, 25, 27, 30, 33, 34, 36, 37, 44, 45, 46}
    ),
    # TOS TTL RECVOPTS RETOPTS PKTINFO MTU_DISCOVER RECVERR RECVTTL RECVTOS FREEBIND PASSSEC MINTTL
    # BIND_ADDRESS_NO_PORT RECVERR_RFC4884 (not LOCAL_PORT_RANGE: it would choose a port of the host's)
    SOL_IP: frozenset({1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 18, 21, 24, 26}),
    # UNICAST_HOPS MTU_DISCOVER RECVERR RECVERR_RFC4884 FLOWINFO_SEND RECVPKTINFO RECVHOPLIMIT DONTFRAG
    # RECVTCLASS TCLASS AUTOFLOWLABEL ADDR_PREFERENCES MINHOPCOUNT FREEBIND
    SOL_IPV6: frozenset({16, 23, 25, 31, 33, 49, 51, 62, 66, 67, 70, 72, 73, 78}),
}

# Asked of every socket where the hook could not tell which options were set.
_EVERY = (
    *((level, name) for level, names in _PLAIN.items() for name in sorted(names)),
    (SOL_SOCKET, _SNDBUF),
    (SOL_SOCKET, _RCVBUF),
    (SOL_SOCKET, _PRIORITY),
)

_MAX_VALUE = 128


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def options_set(recorded: Options) -> Sequence[tuple[int, int]]:
    """(level, name) of the options that a program set, in its order; of every known one where it set too many."""
    if recorded.overflow:
        return _EVERY
    if not recorded.count:
        return ()
    return [(option.level, option.name) for option in recorded.option[: recorded.count]]


class _Value(NamedTuple):
    """An option to set. Of a packet filter its code."""

    level: int
    name: int
    value: int | bytes


def carry_options(old: Socket, new: Socket, names: Iterable[tuple[int, int]]) -> None:
    """Give ``new`` the values that ``old`` has of those options. What one of them does not know is left."""
    values = list(_values(old, new, names))
    with with_capabilities():
        for level, name, value in values:
            with contextlib.suppress(OSError):
                if (level, name) != (SOL_SOCKET, _ATTACH_FILTER):
                    new.setsockopt(level, name, value)
                elif isinstance(value, bytes):
                    _attach_filter(new, value)


def _values(old: Socket, new: Socket, names: Iterable[tuple[int, int]]) -> Iterator[_Value]:
    """In the order of ``names``; what locks a filter comes last."""
    for level, name in sorted(names, key=lambda one: one == (SOL_SOCKET, _LOCK_FILTER)):
        with contextlib.suppress(OSError):
            # What was not set is not written: a zero of one of its other names would undo a time stamp.
            if names is not _EVERY or old.getsockopt(level, name, _MAX_VALUE) != new.getsockopt(
                level, name, _MAX_VALUE
            ):
                value = _value(old, level, name)
                if value is not None:
                    yield value


def _value(old: Socket, level: int, name: int) -> _Value | None:
    if name in _PLAIN.get(level, frozenset()):
        value = old.getsockopt(level, name, _MAX_VALUE)
        return _Value(level, name, value.rstrip(b"\0") if (level, name) == (SOL_TCP, _TCP_CONGESTION) else value)
    if level != SOL_SOCKET:
        return None
    if name in (_SNDBUF, _SNDBUFFORCE, _RCVBUF, _RCVBUFFORCE):
        # The kernel tells twice what was asked (socket(7)). Never by FORCE: a limit of the host holds.
        plain = _SNDBUF if name in (_SNDBUF, _SNDBUFFORCE) else _RCVBUF
        return _Value(SOL_SOCKET, plain, old.getsockopt(SOL_SOCKET, plain) // 2)
    if name == _PRIORITY:
        # 0 to 6 is anybody's; more, or less than 0, needs CAP_NET_ADMIN over the namespace (socket(7)).
        return _Value(SOL_SOCKET, _PRIORITY, max(0, min(old.getsockopt(SOL_SOCKET, _PRIORITY), 6)))
    if name == _ATTACH_FILTER:
        return _Value(SOL_SOCKET, _ATTACH_FILTER, _filter(old))
    return _Value(SOL_SOCKET, name, old.getsockopt(SOL_SOCKET, name)) if name == _LOCK_FILTER else None


def _filter(sock: Socket) -> bytes:
    """A classic BPF filter's code, which only CAP_NET_ADMIN may read; counted in instructions of 8 bytes.

    (SO_GET_FILTER is read under SO_ATTACH_FILTER's number.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    count = ctypes.c_uint32(0)
    libc.getsockopt(sock.fileno(), SOL_SOCKET, _ATTACH_FILTER, None, ctypes.byref(count))
    code = ctypes.create_string_buffer(count.value * 8)
    if count.value:
        libc.getsockopt(sock.fileno(), SOL_SOCKET, _ATTACH_FILTER, code, ctypes.byref(count))
    return code.raw


def _attach_filter(sock: Socket, code: bytes) -> None:
    """Newer kernels want CAP_NET_ADMIN for it, which the program had. With more, other users' filters would be compiled
    without the care that is taken with them (net.core.bpf_jit_harden).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(code, len(code))
    program = _SockFprog(len(code) // 8, ctypes.addressof(held))
    if code:
        with with_capabilities(CAP_NET_ADMIN):
            libc.setsockopt(sock.fileno(), SOL_SOCKET, _ATTACH_FILTER, ctypes.byref(program), ctypes.sizeof(program))


@contextlib.contextmanager
def as_socket(fd: int, family: int, protocol: int) -> Iterator[Socket]:
    """The stream socket ``fd`` as an object; the descriptor stays the caller's."""
    sock = Socket(AF_INET if family == 4 else AF_INET6, SOCK_STREAM, protocol, fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def is_v6only(fd: int, protocol: int) -> bool:
    """Whether the AF_INET6 socket ``fd`` takes no IPv4."""
    with as_socket(fd, 6, protocol) as sock:
        return bool(sock.getsockopt(SOL_IPV6, IPV6_V6ONLY))


def owner_of(fd: int) -> tuple[int, int]:
    """The user and the group that have a socket. Raises OSError."""
    status = os.fstat(fd)
    return status.st_uid, status.st_gid


def liken(new: Socket, old: int, flags: int, names: Sequence[tuple[int, int]], v6only: bool) -> None:
    """Give ``new`` what ``old`` has: the options ``names``, and what of the open ``flags`` a file keeps.

    IPV6_V6ONLY always: its default differs between namespaces. Its owner it has from its birth. Raises OSError.
    """
    if new.family == AF_INET6:
        new.setsockopt(SOL_IPV6, IPV6_V6ONLY, v6only)
    if names:
        with as_socket(old, 4 if new.family == AF_INET else 6, new.proto) as source:
            carry_options(source, new, names)
    if flags & os.O_NONBLOCK:
        os.set_blocking(new.fileno(), False)
    if flags & os.O_ASYNC:
        _carry_signals(old, new.fileno())


def _carry_signals(old: int, new: int) -> None:
    """Who gets SIGIO, and which signal instead (F_SETOWN_EX, F_SETSIG of fcntl(2)). Raises OSError.

    The kernel asks nobody for a right then. It notes the user ids of who named the receiver, and sends nothing to a
    process that they may not signal (sigio_perm, fs/fcntl.c). So the receiver is named with the ids that are noted
    with the old socket (F_GETOWNER_UIDS; EINVAL, and the program's call fails, in a kernel that does not tell).
    """
    owner = fcntl.fcntl(old, _F_GETOWN_EX, bytes(8))
    if struct.unpack("=ii", owner)[1]:
        # Asked for after the receiver: ids that nobody has noted yet are zeros, which is root.
        uid, euid = struct.unpack("=II", fcntl.fcntl(old, _F_GETOWNER_UIDS, bytes(8)))
        with contextlib.suppress(ProcessLookupError), as_user(uid, euid):  # a receiver that is gone gets nothing
            fcntl.fcntl(new, _F_SETOWN_EX, owner)
    fcntl.fcntl(new, _F_SETSIG, fcntl.fcntl(old, _F_GETSIG))
    fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) | os.O_ASYNC)
