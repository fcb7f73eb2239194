"""Copies a socket's state to its replacement in another network namespace: all that its program set or can see.

The setsockopt hook records which options a program set; their values are read from the socket itself, so that a call
which the kernel refused is not repeated with root's rights. They are set without any capability, so that nothing is
set that an unprivileged program may not set (a congestion control that is reserved for root, a filter that is compiled
without the hardening for other users), and only options of the table below: each has an effect on the socket alone.
Numbers: asm-generic/socket.h, linux/tcp.h, linux/in.h, linux/in6.h.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from _socket import socket as Socket  # socket.socket's own base: a third of its cost to make and to close
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from graft.datapath.layout import OptionsValue
from graft.kernel.capabilities import CAP_NET_ADMIN
from graft.kernel.credentials import as_user, with_capabilities
from graft.kernel.socket_calls import SO_ATTACH_FILTER, SO_LOCK_FILTER, attach_filter, read_filter

AF_INET, AF_INET6, SOCK_STREAM, SOCK_DGRAM = 2, 10, 1, 2
SOL_IP, SOL_SOCKET, SOL_TCP, SOL_UDP, SOL_IPV6 = 0, 1, 6, 17, 41

_SNDBUF, _RCVBUF, _SNDBUFFORCE, _RCVBUFFORCE = 7, 8, 32, 33
_PRIORITY = 12
_TCP_CONGESTION = 13

# asm-generic/fcntl.h, linux/fcntl.h
_F_SETSIG, _F_GETSIG, _F_SETOWN_EX, _F_GETOWN_EX, _F_GETOWNER_UIDS = 10, 11, 15, 16, 17
IPV6_V6ONLY = 26

# Copied unchanged. Names in the order of their numbers.
_UNCHANGED: dict[int, frozenset[int]] = {
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
    # NO_CHECK6_TX NO_CHECK6_RX SEGMENT GRO (not CORK: what was begun stays with the old socket)
    SOL_UDP: frozenset({101, 102, 103, 104}),
    # TOS TTL RECVOPTS RETOPTS PKTINFO MTU_DISCOVER RECVERR RECVTTL RECVTOS PASSSEC RECVORIGDSTADDR MINTTL
    # CHECKSUM BIND_ADDRESS_NO_PORT RECVFRAGSIZE RECVERR_RFC4884 (not LOCAL_PORT_RANGE: it would choose a port of the
    # host's; not FREEBIND, which the setsockopt hook refuses)
    SOL_IP: frozenset({1, 2, 6, 7, 8, 10, 11, 12, 13, 18, 20, 21, 23, 24, 25, 26}),
    # UNICAST_HOPS MULTICAST_HOPS MULTICAST_LOOP MTU_DISCOVER RECVERR RECVERR_RFC4884 FLOWINFO_SEND RECVPKTINFO
    # RECVHOPLIMIT DONTFRAG RECVTCLASS TCLASS AUTOFLOWLABEL ADDR_PREFERENCES MINHOPCOUNT RECVORIGDSTADDR RECVFRAGSIZE
    SOL_IPV6: frozenset({16, 18, 19, 23, 25, 31, 33, 49, 51, 62, 66, 67, 70, 72, 73, 74, 77}),
}

# Asked of every socket where the hook could not tell which options were set.
_ALL_OPTIONS = (
    *((level, name) for level, names in _UNCHANGED.items() for name in sorted(names)),
    (SOL_SOCKET, _SNDBUF),
    (SOL_SOCKET, _RCVBUF),
    (SOL_SOCKET, _PRIORITY),
)

_MAX_VALUE = 128


def recorded_options(recorded: OptionsValue) -> Sequence[tuple[int, int]]:
    """(level, name) of the options that a program set, in its order; all known ones where it set too many."""
    if recorded.overflow:
        return _ALL_OPTIONS
    if not recorded.count:
        return ()
    return [(option.level, option.name) for option in recorded.option[: recorded.count]]


class _Value(NamedTuple):
    """An option to set. The value of a packet filter is its code."""

    level: int
    name: int
    value: int | bytes


def copy_options(old: Socket, new: Socket, names: Iterable[tuple[int, int]]) -> None:
    """Copy the values of those options from ``old`` to ``new``, except for those that one of them does not have."""
    values = list(_values(old, new, names))
    with with_capabilities():
        for level, name, value in values:
            with contextlib.suppress(OSError):
                if (level, name) != (SOL_SOCKET, SO_ATTACH_FILTER):
                    new.setsockopt(level, name, value)
                elif isinstance(value, bytes):
                    _attach_filter(new, value)


def _values(old: Socket, new: Socket, names: Iterable[tuple[int, int]]) -> Iterator[_Value]:
    """In the order of ``names``, except that the option which locks a filter comes last."""
    for level, name in sorted(names, key=lambda one: one == (SOL_SOCKET, SO_LOCK_FILTER)):
        with contextlib.suppress(OSError):
            # A default is not written: a zero by another name of a time stamp's option would switch the time stamp off.
            if names is not _ALL_OPTIONS or old.getsockopt(level, name, _MAX_VALUE) != new.getsockopt(
                level, name, _MAX_VALUE
            ):
                value = _value(old, level, name)
                if value is not None:
                    yield value


def _value(old: Socket, level: int, name: int) -> _Value | None:
    if name in _UNCHANGED.get(level, frozenset()):
        value = old.getsockopt(level, name, _MAX_VALUE)
        return _Value(level, name, value.rstrip(b"\0") if (level, name) == (SOL_TCP, _TCP_CONGESTION) else value)
    if level != SOL_SOCKET:
        return None
    if name in (_SNDBUF, _SNDBUFFORCE, _RCVBUF, _RCVBUFFORCE):
        # The kernel reports twice the value that was set (socket(7)). Never by FORCE: the host's limit applies.
        plain = _SNDBUF if name in (_SNDBUF, _SNDBUFFORCE) else _RCVBUF
        return _Value(SOL_SOCKET, plain, old.getsockopt(SOL_SOCKET, plain) // 2)
    if name == _PRIORITY:
        # A priority outside of 0 to 6 needs CAP_NET_ADMIN over the namespace (socket(7)).
        return _Value(SOL_SOCKET, _PRIORITY, max(0, min(old.getsockopt(SOL_SOCKET, _PRIORITY), 6)))
    if name == SO_ATTACH_FILTER:
        return _Value(SOL_SOCKET, SO_ATTACH_FILTER, read_filter(old.fileno()))
    return _Value(SOL_SOCKET, name, old.getsockopt(SOL_SOCKET, name)) if name == SO_LOCK_FILTER else None


def _attach_filter(sock: Socket, code: bytes) -> None:
    """With CAP_NET_ADMIN, which newer kernels require, and which the program had; with no other capability, so that
    the filter is compiled with the hardening for other users (net.core.bpf_jit_harden).
    """
    if code:
        with with_capabilities(CAP_NET_ADMIN):
            attach_filter(sock.fileno(), code)


def type_of(protocol: int) -> int:
    """The type of a socket of that protocol."""
    return SOCK_DGRAM if protocol == SOL_UDP else SOCK_STREAM


@contextlib.contextmanager
def as_socket(fd: int, family: int, protocol: int) -> Iterator[Socket]:
    """The socket ``fd`` as an object, which does not close the descriptor."""
    sock = Socket(AF_INET if family == 4 else AF_INET6, type_of(protocol), protocol, fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def is_v6only(fd: int, protocol: int) -> bool:
    """Whether the AF_INET6 socket ``fd`` is IPv6-only."""
    with as_socket(fd, 6, protocol) as sock:
        return bool(sock.getsockopt(SOL_IPV6, IPV6_V6ONLY))


def make_v6only(fd: int, protocol: int) -> None:
    """Make the AF_INET6 socket ``fd`` IPv6-only. Without effect where it has got a port meanwhile."""
    with as_socket(fd, 6, protocol) as sock, contextlib.suppress(OSError):
        sock.setsockopt(SOL_IPV6, IPV6_V6ONLY, 1)


def copy_socket_state(new: Socket, old: int, flags: int, names: Sequence[tuple[int, int]], v6only: bool) -> None:
    """Copy the state of ``old`` to ``new``: the options ``names``, O_NONBLOCK and O_ASYNC of ``flags``.

    IPV6_V6ONLY is always set: its default differs between namespaces. ``new`` has its owner since it was made
    (socket_pool.py). Raises OSError.
    """
    if new.family == AF_INET6:
        new.setsockopt(SOL_IPV6, IPV6_V6ONLY, v6only)
    if names:
        with as_socket(old, 4 if new.family == AF_INET else 6, new.proto) as source:
            copy_options(source, new, names)
    if flags & os.O_NONBLOCK:
        os.set_blocking(new.fileno(), False)
    if flags & os.O_ASYNC:
        _copy_signal_owner(old, new.fileno())


def _copy_signal_owner(old: int, new: int) -> None:
    """Copy O_ASYNC with the process that gets SIGIO, or another signal (F_SETOWN_EX, F_SETSIG of fcntl(2)).

    The kernel checks no permission in these calls. It records the user ids of the caller of F_SETOWN_EX, and sends no
    signal to a process that these users may not signal (sigio_perm, fs/fcntl.c). So F_SETOWN_EX is called with the
    ids that are recorded with the old socket (F_GETOWNER_UIDS; on a kernel without it, EINVAL, and the program's call
    fails). Raises OSError.
    """
    owner = fcntl.fcntl(old, _F_GETOWN_EX, bytes(8))
    if struct.unpack("=ii", owner)[1]:
        # Read after the receiver: ids that are not recorded yet are zeros, which is root.
        uid, euid = struct.unpack("=II", fcntl.fcntl(old, _F_GETOWNER_UIDS, bytes(8)))
        with contextlib.suppress(ProcessLookupError), as_user(uid, euid):  # the receiver is gone
            fcntl.fcntl(new, _F_SETOWN_EX, owner)
    fcntl.fcntl(new, _F_SETSIG, fcntl.fcntl(old, _F_GETSIG))
    fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) | os.O_ASYNC)
