"""Byte counts of a TCP connection, and its receive buffer.

Sources: struct tcp_info of include/uapi/linux/tcp.h (offsets), tcp(7) for SIOCOUTQ, socket(7) for SO_RCVLOWAT.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios

SO_COOKIE = 57  # asm-generic/socket.h
_INFO_BYTES = 136
_ACKED_AND_RECEIVED = struct.Struct("=120xQQ")  # tcpi_bytes_acked, tcpi_bytes_received
_INT = struct.Struct("=i")
_ROOM = bytes(4)


def cookie(sock: socket.socket) -> int:
    """The socket's own number, not used again while the machine is up."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def received(sock: socket.socket) -> int:
    """Bytes received in order, plus one for the end of the peer's stream.

    The kernel takes the socket's lock for it: what was processing the socket before has finished when this returns.
    """
    return int(_ACKED_AND_RECEIVED.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))[1])


def unsent(sock: socket.socket) -> int:
    """Bytes in the send queue that the peer has not acknowledged."""
    return int(_INT.unpack(fcntl.ioctl(sock, termios.TIOCOUTQ, _ROOM))[0])


def written(sock: socket.socket) -> int:
    """Bytes that were put into the send queue since the connection began, acknowledged or not.

    Where the socket connected (and was not accepted) its SYN counts as one. Never too many: what the peer
    acknowledges between the two system calls is missing from the result.
    """
    acked = _ACKED_AND_RECEIVED.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))[0]
    return int(acked) + unsent(sock)


def enlarge_receive_buffer(sock: socket.socket, size: int) -> None:
    """Enlarge the receive buffer to ``size`` bytes at least; it still grows automatically (which it would
    not after SO_RCVBUF). This is what tcp_set_rcvlowat does for a reader that requests as much.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def reprocess_received(sock: socket.socket) -> None:
    """Make the kernel process the receive queue again, as when data arrives (tcp_set_rcvlowat)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
