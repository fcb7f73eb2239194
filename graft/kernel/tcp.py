"""How far a TCP connection is, in bytes.

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
    """The socket's own number, never given to another one while the machine is up."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def received(sock: socket.socket) -> int:
    """Bytes that came in order, and one more for the peer's end of the stream. Whoever was at work on the
    socket when this is called has finished when it returns: the kernel takes the socket's lock for it.
    """
    return int(_ACKED_AND_RECEIVED.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))[1])


def unsent(sock: socket.socket) -> int:
    """Bytes in the send queue that the peer has not acknowledged."""
    return int(_INT.unpack(fcntl.ioctl(sock, termios.TIOCOUTQ, _ROOM))[0])


def written(sock: socket.socket) -> int:
    """Bytes that were put into the send queue since the connection began, whether the peer has them or not.

    Where the socket connected (and was not accepted) its SYN counts as one. Never too many: what the peer
    acknowledges between the two questions asked here is missing from the answer.
    """
    acked = _ACKED_AND_RECEIVED.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))[0]
    return int(acked) + unsent(sock)


def enlarge_receive_buffer(sock: socket.socket, size: int) -> None:
    """Let the receive buffer hold ``size`` bytes at least, and grow by itself from there as before (which it would
    not after SO_RCVBUF): what tcp_set_rcvlowat does for a reader that asks for so much.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def reprocess_received(sock: socket.socket) -> None:
    """Have the kernel do once more what it does when data arrives (tcp_set_rcvlowat)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
