"""The calling thread with fewer rights than root's, temporarily: user ids, groups, capabilities.

What a supervisor repeats for a program must not be done with root's rights where the kernel checks, or records, who
did it. The system calls are made directly: they change only the calling thread, while libc's functions of the
same names change every thread of the process (setresuid(2), "C library/kernel differences").

The saved user id stays root's, so that the thread can switch back, and so that other users have no access: ptrace and
/proc check all three ids. Another user's process can only send a signal to this thread meanwhile (kill(2) checks the
real or the saved id), and not change its priority or processors, because it keeps root's permitted capabilities
(cap_safe_nice in security/commoncap.c): only the effective ones may be cleared. A supervisor that is killed so is
started again by its keeper.

Sources: setresuid(2), setfsuid(2), setgroups(2), capset(2), credentials(7); kernel/sys.c, kernel/signal.c
(kill_ok_by_cred).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator, Sequence

from graft.errors import PrivilegeError
from graft.kernel import bpf, capabilities
from graft.kernel.syscalls import syscall

_ROOT = 0
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
_UNMAPPED = 0xFFFFFFFF  # (uid_t) -1: an id that this user namespace has no number for; setresuid: "leave it as it is"
_UNCHANGED = -1


def require_root() -> None:
    """Raises PrivilegeError for any other user than the host's root, with its capabilities, among its processes.

    In another pid namespace the hooks would not know the supervisors, which they know by their process ids.
    """
    if os.geteuid() != 0:
        raise PrivilegeError("this needs root", "run it with sudo")
    if not bpf.is_permitted():
        raise PrivilegeError("this needs the host's root", "root of a container or a user namespace is not enough")
    if not _is_among_the_hosts_processes():
        raise PrivilegeError("this needs the host's root, and its process ids", "not in a pid namespace of its own")


def _is_among_the_hosts_processes() -> bool:
    """Whether this is the first pid namespace: its number is fixed (PROC_PID_INIT_INO, include/linux/proc_ns.h)."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    except OSError:  # no /proc: other things will say so
        return True


@contextlib.contextmanager
def as_user(uid: int, euid: int) -> Iterator[None]:
    """Run the block with the real user id ``uid`` and the effective one ``euid``; the calling thread is root's.

    Unless ``euid`` is root's too the thread has no effective capability meanwhile. Raises OSError: EPERM for an id of
    another user namespace that is not mapped in this one.
    """
    if _UNMAPPED in (uid, euid):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    syscall("setresuid", uid, euid, _ROOT)
    try:
        yield
    finally:
        with _or_exit():
            syscall("setresuid", _ROOT, _ROOT, _ROOT)


@contextlib.contextmanager
def connecting_as(uid: int, gid: int) -> Iterator[None]:
    """Connect a unix socket in the block: its server is shown ``uid`` and ``gid`` (SO_PEERCRED of unix(7)), while the
    file is opened with root's rights. The calling thread is root's. Raises OSError.
    """
    if _UNMAPPED in (uid, gid):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    if uid == _ROOT and gid == _ROOT:
        yield
        return
    try:
        syscall("setresgid", _UNCHANGED, gid, _UNCHANGED)
        syscall("setresuid", _UNCHANGED, uid, _UNCHANGED)
        _set_file_ids(_ROOT, _ROOT)  # with it come back the capabilities for files (capabilities(7))
        yield
    finally:
        with _or_exit():
            syscall("setresuid", _UNCHANGED, _ROOT, _UNCHANGED)
            syscall("setresgid", _UNCHANGED, _ROOT, _UNCHANGED)


@contextlib.contextmanager
def owning_files_as(uid: int, gid: int) -> Iterator[None]:
    """The calling thread, root's, with those file-system ids, then root's again.

    A file that is made meanwhile is theirs: its inode, and who is noted as having opened it. Raises OSError.
    """
    if uid == _ROOT and gid == _ROOT:
        yield
        return
    try:
        _set_file_ids(uid, gid)
        yield
    finally:
        with _or_exit():
            _set_file_ids(_ROOT, _ROOT)


@contextlib.contextmanager
def in_groups(gid: int, groups: Sequence[int]) -> Iterator[None]:
    """The calling thread, root's, with the effective group ``gid`` and those supplementary groups, then its own again.

    Its user stays root. Raises OSError.
    """
    before = os.getgroups()
    try:
        _set_groups(groups)
        syscall("setresgid", _UNMAPPED, gid, _UNMAPPED)
        yield
    finally:
        with _or_exit():
            syscall("setresgid", _UNMAPPED, _ROOT, _UNMAPPED)
            _set_groups(before)


def _set_groups(groups: Sequence[int]) -> None:
    syscall("setgroups", len(groups), (ctypes.c_uint32 * len(groups))(*groups))


def _set_file_ids(uid: int, gid: int) -> None:
    """setfsuid(2) says nothing where it fails (no memory): it tells what there was, and that is asked for again."""
    for call, wanted in (("setfsgid", gid), ("setfsuid", uid)):
        syscall(call, wanted)
        if syscall(call, -1) & _UNMAPPED != wanted:
            raise OSError(errno.ENOMEM, f"{call}: {os.strerror(errno.ENOMEM)}")


@contextlib.contextmanager
def with_capabilities(*wanted: int) -> Iterator[None]:
    """Run the block with no effective capabilities but ``wanted``, as far as the calling thread is permitted them.

    Its user ids stay. Raises OSError.
    """
    before = capabilities.current()
    fewer = type(before).from_buffer_copy(before)
    mask = sum(1 << one for one in wanted)
    for half, allowed in zip(fewer, (mask & 0xFFFFFFFF, mask >> 32), strict=True):
        half.effective = half.permitted & allowed
    capabilities.set_current(fewer)
    try:
        yield
    finally:
        with _or_exit():
            capabilities.set_current(before)


@contextlib.contextmanager
def _or_exit() -> Iterator[None]:
    """Exit the process if the block fails: a process with the wrong rights must not continue."""
    try:
        yield
    except BaseException:
        os._exit(1)
