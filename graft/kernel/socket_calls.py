"""Calls on one socket that Python's own socket object cannot make: its name without a new object, packet filters.

A classic BPF filter is counted in instructions of 8 bytes. Sources: socket(7), getsockname(2); sk_get_filter and
sk_attach_filter in net/core/filter.c of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable

SOCKADDR_SIZE = 28  # sizeof(struct sockaddr_in6)
SO_ATTACH_FILTER, SO_LOCK_FILTER = 26, 44  # asm-generic/socket.h
_SO_GET_FILTER = SO_ATTACH_FILTER
_UNSPECIFIED = bytes(16)  # struct sockaddr of AF_UNSPEC: connect(2)
_INSTRUCTION_SIZE = 8  # sizeof(struct sock_filter)
_libc = ctypes.CDLL(None, use_errno=True)

getsockname = ctypes.CDLL(None).getsockname
"""libc's own function, for a caller that makes it often: ``getsockname(fd, *name_buffer())``."""


class FilterProgram(ctypes.Structure):
    """A classic BPF program (struct sock_fprog)."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def name_buffer() -> tuple[object, object]:
    """Room for any name of an IP socket, as the second and the third argument of `getsockname`."""
    return ctypes.byref(ctypes.create_string_buffer(SOCKADDR_SIZE)), ctypes.byref(ctypes.c_uint32(SOCKADDR_SIZE))


def read_filter(fd: int) -> bytes:
    """The code of a socket's filter, empty where it has none. Needs CAP_NET_ADMIN. Raises OSError."""
    count = ctypes.c_uint32(0)
    _check(_libc.getsockopt(fd, socket.SOL_SOCKET, _SO_GET_FILTER, None, ctypes.byref(count)), "getsockopt")
    code = ctypes.create_string_buffer(count.value * _INSTRUCTION_SIZE)
    if count.value:
        _check(_libc.getsockopt(fd, socket.SOL_SOCKET, _SO_GET_FILTER, code, ctypes.byref(count)), "getsockopt")
    return code.raw


def option(fd: int, name: int, size: int, level: int = socket.SOL_SOCKET) -> bytes:
    """An option of a socket. Raises OSError."""
    value, length = ctypes.create_string_buffer(size), ctypes.c_uint32(size)
    _check(_libc.getsockopt(fd, level, name, value, ctypes.byref(length)), "getsockopt")
    return value.raw


def place_of(fd: int) -> tuple[bytes, int]:
    """Packed address and port of an IP socket. Waits for its lock, not with the interpreter's. Raises OSError."""
    return _place(_libc.getsockname, fd, "getsockname")


def peer_of(fd: int) -> tuple[bytes, int] | None:
    """The same of its remote end, None where it has none. Raises OSError."""
    try:
        return _place(_libc.getpeername, fd, "getpeername")
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return None


def _place(call: Callable[..., int], fd: int, name: str) -> tuple[bytes, int]:
    address, length = ctypes.create_string_buffer(SOCKADDR_SIZE), ctypes.c_uint32(SOCKADDR_SIZE)
    _check(call(fd, address, ctypes.byref(length)), name)
    family, port = struct.unpack_from("=H2s", address.raw)
    packed = address.raw[4:8] if family == socket.AF_INET else address.raw[8:24]
    return packed, int.from_bytes(port, "big")


def end(sock: socket.socket) -> None:
    """End a connection at once, though other processes have the socket too: its peer sees a reset, that of a unix
    socket the end of the stream. A listener refuses from now on. (tcp_disconnect, which close(2) calls too.)
    """
    if sock.family == socket.AF_UNIX:
        _libc.shutdown(sock.fileno(), socket.SHUT_RDWR)
    else:
        _libc.connect(sock.fileno(), _UNSPECIFIED, len(_UNSPECIFIED))


def attach_filter(fd: int, code: bytes) -> None:
    """Have a filter look at all that a socket receives. Raises OSError."""
    instructions = ctypes.create_string_buffer(code, len(code))
    program = FilterProgram(len(code) // _INSTRUCTION_SIZE, ctypes.addressof(instructions))
    _set_option(fd, SO_ATTACH_FILTER, program)


def lock_filter(fd: int) -> None:
    """Let nobody remove or replace a socket's filter. Raises OSError."""
    _set_option(fd, SO_LOCK_FILTER, ctypes.c_int(1))


def set_number(fd: int, name: int, value: int) -> None:
    """Set an option of a socket. Raises OSError."""
    _set_option(fd, name, ctypes.c_int(value))


def _set_option(fd: int, name: int, value: ctypes.Structure | ctypes.c_int) -> None:
    result = _libc.setsockopt(fd, socket.SOL_SOCKET, name, ctypes.byref(value), ctypes.sizeof(value))
    _check(result, "setsockopt")


def _check(result: int, name: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
