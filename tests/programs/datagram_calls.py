"""Calls and options of datagrams, with what the kernel says: the same in a container as on the host.

Run with /usr/bin/python3 -ISu FILE ADDRESS [ANOTHER]: a server at ADDRESS, port 7777, sends back what it gets; at port
9 is nobody. With ANOTHER of the same family: calls for many datagrams go to servers at both in turn. Ports of the
kernel's choice are not printed.
"""

import ctypes
import errno
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable

PEER = sys.argv[1]
SIX = ":" in PEER
FAMILY = socket.AF_INET6 if SIX else socket.AF_INET
LEVEL = 41 if SIX else 0
PKTINFO, TTL, TOS, RECVERR, MTU_DISCOVER, MTU = (49, 51, 66, 25, 23, 24) if SIX else (8, 12, 13, 11, 10, 14)
SOL_UDP, SEGMENT, GRO = 17, 103, 104
TIMESTAMPING, ZEROCOPY, MSG_ZEROCOPY = 37, 60, 0x4000000
ECHO, NOBODY = (PEER, 7777), (PEER, 9)
BOTH = [(address, 7777) for address in (sys.argv[1:] * 2)[:2]]
LIBC = ctypes.CDLL(None, use_errno=True)


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("len", ctypes.c_size_t))


class Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("namelen", ctypes.c_uint), ("iov", ctypes.POINTER(Vector)),
        ("iovlen", ctypes.c_size_t), ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int), ("zero", ctypes.c_int), ("len", ctypes.c_uint),
    )  # fmt: skip


def new() -> socket.socket:
    return socket.socket(FAMILY, socket.SOCK_DGRAM)


def packed(peer: tuple[str, int]) -> bytes:
    """struct sockaddr_in, or sockaddr_in6."""
    head = struct.pack("=H", FAMILY) + struct.pack(">H", peer[1])
    address = socket.inet_pton(FAMILY, peer[0])
    return head + (bytes(4) + address + bytes(4) if SIX else address + bytes(8))


def name_of(found: bytes) -> tuple[str, int]:
    at = 8 if SIX else 4
    return socket.inet_ntop(FAMILY, found[at : at + (16 if SIX else 4)]), struct.unpack(">H", found[2:4])[0]


def messages(texts: list[bytes], peers: list[tuple[str, int]]) -> "ctypes.Array[Message]":
    made = (Message * len(texts))()
    for one, text, peer in zip(made, texts, peers, strict=True):
        name = ctypes.create_string_buffer(packed(peer), 28)
        one.name, one.namelen = ctypes.addressof(name), 28 if SIX else 16
        one.iov, one.iovlen = ctypes.pointer(Vector(text, len(text))), 1
        kept.append(name)
    return made


kept: list[object] = []


def error_of(call: "Callable[..., object]", *words: object) -> str:
    try:
        call(*words)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "none"


def errors_of(sock: socket.socket) -> object:
    """What the error queue has: the name, and struct sock_extended_err (without an id and times) and its origin."""
    poll = select.poll()
    poll.register(sock, 0)
    if not poll.poll(5000):
        return "nothing"
    data, found, flags, sender = sock.recvmsg(100, 500, socket.MSG_ERRQUEUE)
    shown = [(level, kind, value[:8], value[16:48].rstrip(b"\0")) for level, kind, value in found if level in (0, 41)]
    return data[:10], flags == socket.MSG_ERRQUEUE, sender and sender[:2], shown


def send(sock: socket.socket, data: bytes, to: "tuple[str, int] | None") -> None:
    if to is None:
        sock.send(data)
    else:
        sock.sendto(data, to)


def many_at_once() -> None:
    sock = new()
    texts = [b"text %d" % number for number in range(4)]
    print("sendmmsg", LIBC.sendmmsg(sock.fileno(), messages(texts, BOTH * 2), 4, 0))
    found: list[object] = []
    while len(found) < 4:
        buffers = [ctypes.create_string_buffer(9) for _ in texts]
        room = messages([b""] * 4, [NOBODY] * 4)
        for one, buffer in zip(room, buffers, strict=True):
            one.iov = ctypes.pointer(Vector(ctypes.cast(buffer, ctypes.c_char_p), 9))
        for one, buffer in list(zip(room, buffers, strict=True))[
            : LIBC.recvmmsg(sock.fileno(), room, 4, 0x10000, None)
        ]:
            found.append((buffer.raw[: one.len], name_of(ctypes.string_at(one.name, 28))))
    print("recvmmsg", sorted(found, key=str))


def segments() -> None:
    for by_message, connected in ((False, False), (False, True), (True, False), (True, True)):
        sock = new()
        sock.setsockopt(SOL_UDP, GRO, 1)
        if by_message:
            control = [(SOL_UDP, SEGMENT, struct.pack("=H", 100))]
        else:
            sock.setsockopt(SOL_UDP, SEGMENT, 100)
            control = []
        if connected:
            sock.connect(ECHO)
        print("segments", sock.sendmsg([b"y" * 350], control, 0, *(() if connected else (ECHO,))))
        size = 0
        while size < 350:
            data, _, _, sender = sock.recvmsg(1000, 100)
            size += len(data)
        print(size, sender[:2], sock.getsockopt(SOL_UDP, SEGMENT), sock.getsockopt(SOL_UDP, GRO))
    print("too many", error_of(new().sendmsg, [b"y" * 350], [(SOL_UDP, SEGMENT, struct.pack("=H", 1))], 0, ECHO))


def about_a_datagram() -> None:
    for connected in (False, True):
        sock = new()
        for option in (PKTINFO, TTL, TOS):
            sock.setsockopt(LEVEL, option, 1)
        if connected:
            sock.connect(ECHO)
        send(sock, b"info", None if connected else ECHO)
        data, found, flags, sender = sock.recvmsg(2, 200, socket.MSG_PEEK)
        print(data, sorted(found), flags, sender[:2])
        print(sock.recv(9))
    print(sock.getsockname()[0], sock.getpeername())


def errors_of_the_network() -> None:
    for connected in (False, True):
        sock = new()
        sock.setsockopt(LEVEL, RECVERR, 1)
        if connected:
            sock.connect(NOBODY)
        send(sock, b"nobody", None if connected else NOBODY)
        print("connected" if connected else "unconnected", errors_of(sock))
        print("once", error_of(sock.recvmsg, 9, 100, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT))
    plain = new()
    plain.connect(NOBODY)
    plain.send(b"nobody")
    select.select([plain], [], [], 20)
    print("refused", error_of(plain.recv, 9), plain.getsockopt(1, 4), error_of(plain.send, b"again"))


def sizes() -> None:
    sock = new()
    sock.setsockopt(LEVEL, RECVERR, 1)
    sock.setsockopt(LEVEL, MTU_DISCOVER, 2)
    sock.connect(ECHO)
    print("mtu", sock.getsockopt(LEVEL, MTU))
    print("too long", error_of(sock.send, b"z" * 66000), error_of(sock.send, bytes(sock.getsockopt(LEVEL, MTU) + 1)))
    print("queue", errors_of(sock))
    whole = new()
    print(whole.sendto(b"z" * 30000, ECHO), len(whole.recv(65000)))


def what_was_sent() -> None:
    sock = new()
    sock.setsockopt(1, TIMESTAMPING, 1 << 1 | 1 << 4 | 1 << 7 | 1 << 11)  # TX_SOFTWARE SOFTWARE OPT_ID OPT_TSONLY
    sock.sendto(b"when", ECHO)
    print("time", errors_of(sock), sock.recv(9))
    sock = new()
    sock.setsockopt(1, ZEROCOPY, 1)
    # One packet: of a fragment the kernel says late that it is done with it, where the receiver is on another CPU.
    print(sock.sendto(b"zero" * 250, MSG_ZEROCOPY, ECHO))
    print("zero copy", errors_of(sock), len(sock.recv(9999)))


signal.alarm(60)
many_at_once()
segments()
about_a_datagram()
errors_of_the_network()
sizes()
what_was_sent()
