"""The sockets that a container holds on the host's stack, found through its own processes.

A socket belongs to a container if one of its processes has a descriptor of it (/proc/PID/fd) and the kernel
lists it in the host's namespace, or in one that an endpoint names. Its tag says what it was granted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from graft import layout, store
from graft.containers import Container
from graft.decision import Sockaddr
from graft.kernel import cgroup, netns, sockets
from graft.kernel.pidfd import pidfd_getfd, pidfd_open
from graft.kernel.sockets import Listed
from graft.layout import Home
from graft.maps import Maps
from graft.settings import Settings

_SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K of linux/filter.h: keep 0 bytes


@dataclass(frozen=True, slots=True)
class Held:
    """A socket of a container on the host's stack, and one place where the container has it.

    ``endpoint`` names what it was granted, ``asked`` is the address that the program bound; both None for a
    socket that no rule gave it.
    """

    pid: int
    fd: int
    listed: Listed
    endpoint: str | None = None
    asked: str | None = None

    def __str__(self) -> str:
        one = self.listed
        peer = f" with {one.remote}" if one.state not in ("listening", "unconnected") else ""
        grant = f", bound as {self.asked} to {self.endpoint}" if self.endpoint and self.asked else ""
        return f"{one.protocol} {one.state} {one.local}{peer} (process {self.pid}{grant})"


def descriptors(pids: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Inode of every socket of these processes -> (process, descriptor), the first that has it."""
    found: dict[int, tuple[int, int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry.path))
                    if match:
                        found.setdefault(int(match[1]), (pid, int(entry.name)))
    return found


def _namespaces(settings: Settings) -> Iterator[Path]:
    """Where sockets of containers may live: the host's namespace, and those of endpoints."""
    yield settings.host_netns
    for stored in store.listing(settings):
        if stored.endpoint.netns is not None:
            yield store.netns_path(settings, stored)


def _listed(settings: Settings) -> Iterator[Listed]:
    seen: set[int] = set()
    for path in _namespaces(settings):
        with contextlib.suppress(OSError), netns.entered(path):
            cookie = netns.cookie()
            if cookie not in seen:
                seen.add(cookie)
                yield from list(sockets.listed())


@contextlib.contextmanager
def borrowed(pid: int, fd: int, inode: int) -> Iterator[socket.socket | None]:
    """A copy of a process's socket; None where it is not that socket any more."""
    sock: socket.socket | None = None
    with contextlib.suppress(OSError):
        process = pidfd_open(pid)
        try:
            sock = socket.socket(fileno=pidfd_getfd(process, fd))
        finally:
            os.close(process)
    if sock is not None and os.fstat(sock.fileno()).st_ino != inode:
        sock.close()
        sock = None
    try:
        yield sock
    finally:
        if sock is not None:
            sock.close()


def tag_of(maps: Maps, sock: socket.socket) -> layout.Tag | None:
    """What the hooks know of a socket."""
    return maps.tags.get(ctypes.c_int32(sock.fileno()))


def of(settings: Settings, maps: Maps, containers: Iterable[Container]) -> dict[int, list[Held]]:
    """The sockets of each of ``containers``, by its id. The kernel is asked once for all of them."""
    names = {stored.id: stored.endpoint.name for stored in store.listing(settings)}
    listed = [one for one in _listed(settings) if one.inode]
    found: dict[int, list[Held]] = {}
    for container in containers:
        places = descriptors(cgroup.processes(container.cgroup_path))
        here = found.setdefault(container.id, [])
        for one in listed:
            if one.inode in places:
                here.append(_held(maps, names, container.id, one, *places[one.inode]))
    return found


def _held(maps: Maps, names: dict[int, str], container: int, one: Listed, pid: int, fd: int) -> Held:
    with borrowed(pid, fd, one.inode) as sock:
        tag = None if sock is None else tag_of(maps, sock)
    if tag is None or tag.container != container or tag.home != Home.HOST or not tag.endpoint:
        return Held(pid, fd, one)
    asked = str(Sockaddr(tag.family, bytes(tag.addr), tag.port)) if tag.given else None
    return Held(pid, fd, one, names.get(tag.endpoint, "(deleted)"), asked)


def in_host(settings: Settings, pids: Iterable[int]) -> list[Held]:
    """The sockets of processes that are not attached yet, in the host's namespace only."""
    places = descriptors(pids)
    with netns.entered(settings.host_netns):
        listed = list(sockets.listed())
    return [Held(*places[one.inode], one) for one in listed if one.inode in places]


def mark_heard(maps: Maps, container: int, existing: Iterable[Held]) -> None:
    """Let go on hearing what heard before its container, the direct one ``container``, came under a policy."""
    for one in existing:
        if one.listed.protocol == "udp" or one.listed.state == "listening":
            with borrowed(one.pid, one.fd, one.listed.inode) as sock, contextlib.suppress(OSError):
                if sock is not None:
                    port = int(one.listed.local.rpartition(":")[2])
                    tag = layout.Tag(container=container, home=Home.HOST, heard=port)
                    maps.tags.put(ctypes.c_int32(sock.fileno()), tag)


def withdraw(held: Held) -> bool:
    """Take a granted socket out of use: a listener stops listening, a connection ends, datagrams stop coming.

    False where the container does not have it any more.
    """
    with borrowed(held.pid, held.fd, held.listed.inode) as sock:
        if sock is None:
            return False
        if held.listed.protocol == "udp":
            _deafen(sock)
        with contextlib.suppress(OSError):  # ENOTCONN of an unconnected UDP socket, which it wakes all the same
            sock.shutdown(socket.SHUT_RDWR)
    return True


def _deafen(sock: socket.socket) -> None:
    """Let nothing reach a socket any more: a filter that drops all, and that cannot be taken off (socket(7))."""
    instructions = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
    program = struct.pack("@HP", len(_DROP_ALL) // 8, ctypes.addressof(instructions))
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        sock.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
