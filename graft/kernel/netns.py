"""Network namespaces: entered, identified by cookie, found by name, process or path, kept by a mount.

Sources: setns(2), network_namespaces(7), ip-netns(8) for /run/netns, SO_NETNS_COOKIE (socket(7), 5.14).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from graft.errors import KernelError, NotFoundError
from graft.kernel.syscalls import syscall

CLONE_NEWNET = 0x40000000
SO_NETNS_COOKIE = 71
_MS_BIND, _MNT_DETACH = 0x1000, 2
_libc = ctypes.CDLL(None, use_errno=True)


def setns(fd: int) -> None:
    """Move the calling thread to the network namespace ``fd``."""
    syscall("setns", fd, CLONE_NEWNET)


def unshare_netns() -> None:
    """Give the calling thread a network namespace of its own, with lo down."""
    syscall("unshare", CLONE_NEWNET)


@contextlib.contextmanager
def entered(path: Path) -> Iterator[None]:
    """Run the block with the calling thread in the namespace at ``path``. Sockets made inside stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(fd)
        finally:
            os.close(fd)
        try:
            yield
        finally:
            setns(home)
    finally:
        os.close(home)


def socket_cookie(sock: socket.socket) -> int:
    """Cookie of the namespace that a socket belongs to: unique on this machine while it is up."""
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])


def cookie(path: Path | None = None) -> int:
    """Cookie of the namespace at ``path``, by default of the calling thread's own."""
    if path is not None:
        with entered(path):
            return cookie()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return socket_cookie(sock)


def inodes_of(pids: Iterable[int]) -> Counter[int]:
    """How many of these processes are in which network namespace, by its inode. Those that have exited do not count."""
    counted: Counter[int] = Counter()
    for pid in pids:
        with contextlib.suppress(OSError):
            counted[os.stat(f"/proc/{pid}/ns/net").st_ino] += 1
    return counted


def resolve(spec: str) -> Path:
    """The path of a namespace given by name (of `ip netns`), process id, or path.

    Raises NotFoundError.
    """
    if spec.startswith("/"):
        path = Path(spec)
    elif spec.isdigit():
        path = Path(f"/proc/{spec}/ns/net")
    else:
        path = Path("/run/netns") / spec
        if "/" in spec or spec in (".", ".."):
            raise NotFoundError(f"netns: {spec!r} is not a name of a network namespace", "ip netns list")
    if not path.exists():
        raise NotFoundError(f"netns: network namespace {spec!r} not found", "a name of `ip netns`, a pid, or a path")
    try:
        cookie(path)
    except OSError as error:
        raise NotFoundError(f"netns: {spec!r} is not a network namespace ({error.strerror})") from error
    return path


def keep(source: Path, target: Path) -> None:
    """Mount the namespace at ``source`` on the file ``target``: it then exists there until `release`."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.touch(mode=0o600)
    real = os.fsencode(source.resolve() if not str(source).startswith("/proc/") else source)
    if _libc.mount(real, os.fsencode(target), None, ctypes.c_ulong(_MS_BIND), None) != 0:
        code = ctypes.get_errno()
        target.unlink(missing_ok=True)
        raise KernelError(f"cannot keep the network namespace {source}: {os.strerror(code)}")


def release(target: Path) -> None:
    """Undo `keep`. Safe to repeat."""
    _libc.umount2(os.fsencode(target), _MNT_DETACH)
    target.unlink(missing_ok=True)


def bring_lo_up() -> None:
    """Set lo up in the calling thread's namespace; a new namespace has it down."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=1, state="up")
