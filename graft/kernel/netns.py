"""Network namespaces: entered, identified by cookie, found by name, process or path, kept by a mount.

A process's namespace is entered by its pidfd, also where it is given as /proc/PID/ns/net, and the caller's own is
opened by a socket: both without a look into /proc/PID, whose lock any user who may list it can hold.

Sources: setns(2) (a pidfd: 5.8), SIOCGSKNS (net/socket.c), network_namespaces(7), ip-netns(8) for /run/netns,
SO_NETNS_COOKIE (socket(7), 5.14), netdevice(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from graft.errors import KernelError, NotFoundError
from graft.kernel.syscalls import syscall

CLONE_NEWNET = 0x40000000
SO_NETNS_COOKIE = 71
_SIOCGSKNS, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x894C, 0x8913, 0x8914  # linux/sockios.h
_IFREQ = struct.Struct("=16sh22x")  # struct ifreq of linux/if.h: ifr_name, ifr_flags
_IFF_UP = 1
_OF_PROCESS = re.compile(r"/proc/([0-9]{1,10})/ns/net", re.ASCII)
_MS_BIND, _MNT_DETACH = 0x1000, 2
_libc = ctypes.CDLL(None, use_errno=True)


def setns(fd: int) -> None:
    """Move the calling thread to the network namespace ``fd``."""
    syscall("setns", fd, CLONE_NEWNET)


def open_own() -> int:
    """A descriptor of the calling thread's namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:  # which belongs to it; the hooks ignore this family
        return fcntl.ioctl(sock.fileno(), _SIOCGSKNS)


def open_place(place: Path | int | socket.socket) -> int:
    """A descriptor by which `setns` enters the namespace at a path, of a process, or of a socket, which has it stay
    also when no process is in it. Raises OSError: FileNotFoundError where it is gone.
    """
    if isinstance(place, socket.socket):
        return fcntl.ioctl(place.fileno(), _SIOCGSKNS)
    if isinstance(place, int):
        pid = place
    elif found := _OF_PROCESS.fullmatch(str(place)):
        pid = int(found[1])
    else:
        return os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise FileNotFoundError(errno.ENOENT, f"process {pid} has ended") from error


def unshare_netns() -> None:
    """Give the calling thread a network namespace of its own, with lo down."""
    syscall("unshare", CLONE_NEWNET)


@contextlib.contextmanager
def entered_by(opened: int) -> Iterator[None]:
    """As `entered`, by a descriptor. Raises OSError."""
    home = open_own()
    try:
        setns(opened)
        try:
            yield
        finally:
            setns(home)
    finally:
        os.close(home)


@contextlib.contextmanager
def entered(place: Path | int) -> Iterator[None]:
    """Run the block with the calling thread in the namespace at a path, or of a process. Sockets made inside stay
    there. Raises OSError.
    """
    fd = open_place(place)
    try:
        with entered_by(fd):
            yield
    finally:
        os.close(fd)


def socket_cookie(sock: socket.socket) -> int:
    """Cookie of the namespace that a socket belongs to: unique on this machine while it is up."""
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])


def cookie(place: Path | int | None = None) -> int:
    """Cookie of the namespace at a path, or of a process; by default of the calling thread's own. Raises OSError."""
    if place is not None:
        with entered(place):
            return cookie()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return socket_cookie(sock)


def cookie_by(opened: int) -> int:
    """Cookie of the namespace of a descriptor. Raises OSError."""
    with entered_by(opened):
        return cookie()


def inode(place: Path | int) -> int:
    """The inode of the namespace at a path, or of a process. Raises OSError."""
    with entered(place):
        own = open_own()
        try:
            return os.fstat(own).st_ino
        finally:
            os.close(own)


def inodes_of(pids: Iterable[int]) -> Counter[int]:
    """How many of these processes are in which network namespace, by its inode. Those that have exited do not count."""
    counted: Counter[int] = Counter()
    for pid in pids:
        with contextlib.suppress(OSError):
            counted[inode(pid)] += 1
    return counted


def path_of(spec: str) -> Path:
    """The path of a namespace given by name (of `ip netns`), process id, or path. Raises NotFoundError for what is none
    of these.
    """
    if spec.startswith("/"):
        return Path(spec)
    if spec.isdigit():
        return Path(f"/proc/{spec}/ns/net")
    if "/" in spec or spec in (".", ".."):
        raise NotFoundError(f"netns: {spec!r} is not a name of a network namespace", "ip netns list")
    return Path("/run/netns") / spec


def open_named(spec: str) -> int:
    """A descriptor of the namespace given by name, process id, or path. Raises NotFoundError."""
    try:
        with entered(path_of(spec)):
            return open_own()
    except FileNotFoundError:
        raise NotFoundError(
            f"netns: network namespace {spec!r} not found", "a name of `ip netns`, a pid, or a path"
        ) from None
    except OSError as error:
        raise NotFoundError(f"netns: {spec!r} is not a network namespace ({error.strerror})") from error


def resolve(spec: str) -> Path:
    """The path of the namespace given by name, process id, or path. Raises NotFoundError where there is none."""
    os.close(open_named(spec))
    return path_of(spec)


def keep(opened: int, target: Path) -> None:
    """Mount the namespace of a descriptor on the file ``target``: it then exists there until `release`. One that was
    kept there is released; its file stays, so that this needs no space. Raises KernelError: then that one is kept.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not target.exists():
        target.touch(mode=0o600)
    before = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        was_kept = _libc.umount2(os.fsencode(target), _MNT_DETACH) == 0
        if code := _mount(opened, target):
            if not was_kept or _mount(before, target):
                target.unlink(missing_ok=True)
            raise KernelError(f"cannot keep a network namespace: {os.strerror(code)}")
    finally:
        os.close(before)


def _mount(opened: int, target: Path) -> int:
    """Mount the file of a descriptor on another. Gives an error's number; 0: done."""
    source = os.fsencode(f"/proc/self/fd/{opened}")
    done = _libc.mount(source, os.fsencode(target), None, ctypes.c_ulong(_MS_BIND), None)
    return 0 if done == 0 else ctypes.get_errno()


def release(target: Path) -> None:
    """Undo `keep`. Safe to repeat."""
    _libc.umount2(os.fsencode(target), _MNT_DETACH)
    target.unlink(missing_ok=True)


def bring_lo_up() -> None:
    """Set lo up in the calling thread's namespace; a new namespace has it down. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        raw = fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        name, flags = _IFREQ.unpack(raw)
        fcntl.ioctl(sock.fileno(), _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))
