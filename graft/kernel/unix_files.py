"""Unix sockets of the host's file system: bound at a path, found there, removed.

A folder on the way may belong to somebody who would like to lead Graft elsewhere. So the folder is opened once, by
openat2(2) without following symbolic links, and everything else is done relative to its descriptor, where the last part
of a path is never followed either.

A socket gets its owner and its mode before anybody can connect: it is bound inside a folder that only root can enter,
below the one where it is wanted, and then renamed into place in one step (a unix socket is found by its inode, so it
keeps working under its new name). The address that the socket itself shows, to its program and to its clients
(getsockname, getpeername), is the one that bind() was called with. To choose that, it is called by a thread whose root
directory is that folder.

Sources: unix(7), openat2(2), renameat2(2) and linux/fs.h, unshare(2), chroot(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graft.errors import ConflictError
from graft.kernel import unix_rights
from graft.kernel.syscalls import syscall

_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_CACHED = 0x02, 0x04, 0x20  # linux/openat2.h
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_CLONE_FS = 0x200
_AT_FDCWD = -100
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_pinned_by = [0]
"""The process that has its own descriptors' folder open: a child of it has another folder."""

FileId = tuple[int, int]
"""Device and inode of a socket's file."""


class UnixPathError(ConflictError):
    """A socket cannot be bound at a path, for a reason that the operator can remove. ``errno`` is the program's."""

    def __init__(self, code: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.errno = code

    def __reduce__(self) -> tuple[object, ...]:
        return UnixPathError, (self.errno, self.message, self.hint)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a socket is to be on the host: the path, and the file's owner and mode."""

    path: str
    uid: int
    gid: int
    mode: int

    @property
    def name(self) -> str:
        """Its name in its folder."""
        return os.path.basename(self.path)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _openat2(path: str, flags: int, resolve: int = 0) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | resolve)
    return syscall("openat2", _AT_FDCWD, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))


@contextlib.contextmanager
def folder_of(path: str) -> Iterator[int]:
    """The folder of ``path``, opened without following any link. Raises UnixPathError."""
    folder = os.path.dirname(path)
    try:
        fd = _openat2(folder, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise _folder_error(path, folder, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _folder_error(path: str, folder: str, error: OSError) -> UnixPathError:
    code = error.errno or errno.EIO
    if code == errno.ENOENT:
        return UnixPathError(code, f"{path}: there is no directory {folder}", "make it first")
    if code == errno.ELOOP:
        return UnixPathError(
            code, f"{path}: {folder} is, or leads through, a symbolic link", f"the real path: realpath {folder}"
        )
    return UnixPathError(code, f"{path}: the directory {folder} cannot be opened: {os.strerror(code)}")


def check(path: str) -> FileId | None:
    """Whether a socket could be bound at ``path`` now: raises UnixPathError where it could not.

    Gives the file of a socket there that nobody listens on any more, None where there is none.
    """
    with folder_of(path) as folder:
        _refuse_open_to_all(folder, path)
        return _stale(folder, path)


def _refuse_open_to_all(folder: int, path: str) -> None:
    """Its owner and its group may be meant to replace the socket; but not everybody."""
    mode = os.fstat(folder).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        where = os.path.dirname(path)
        raise UnixPathError(
            errno.EACCES,
            f"{path}: anybody may replace what is in {where}, which has the mode {stat.S_IMODE(mode):04o}",
            f"chmod o-w {where}",
        )


def _stale(folder: int, path: str) -> FileId | None:
    """What `check` gives, in an opened folder."""
    try:
        fd = os.open(os.path.basename(path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnixPathError(error.errno or errno.EIO, f"{path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode):
            raise UnixPathError(errno.EADDRINUSE, f"{path}: exists, and is not a socket", "another path, or remove it")
        if _is_in_use(fd):
            raise UnixPathError(errno.EADDRINUSE, f"{path}: another process listens there", f"ss -xlp src {path}")
        return status.st_dev, status.st_ino
    finally:
        os.close(fd)


def _is_in_use(fd: int) -> bool:
    """Whether some process has the socket of the file ``fd`` (O_PATH): it need not be a stream socket.

    (The kernel refuses clients of a bound socket that does not listen yet as those of a dead one.)
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        unix_rights.refuse(probe)
        try:
            probe.connect(f"/proc/self/fd/{fd}")
        except ConnectionRefusedError:
            return False
        except OSError:  # EAGAIN: its backlog is full; EPROTOTYPE: it is of another type
            return True
    return True


def bind(
    sock: socket.socket,
    target: Target,
    shown: bytes,
    backlog: int | None = None,
    note: Callable[[FileId], None] = lambda file: None,
) -> FileId:
    """Bind ``sock`` at the host's path of ``target``; the socket shows the address ``shown``, an absolute path.

    With a ``backlog`` it listens before it is there. ``note`` is called with the new file, just before it is there. A
    socket file that nobody listens on is replaced. Gives the new file. Raises UnixPathError, OSError.
    """
    with folder_of(target.path) as folder:
        _refuse_open_to_all(folder, target.path)
        stale = _stale(folder, target.path)
        with _private_folder(folder) as private, _bound_inside(sock, private, shown) as (inner, name, file):
            _remove_acl(f"/proc/self/fd/{inner}/{os.fsdecode(name)}", "access")
            os.chown(name, target.uid, target.gid, dir_fd=inner, follow_symlinks=False)
            os.chmod(name, target.mode, dir_fd=inner)
            if backlog is not None:
                sock.listen(backlog)
            note(file)
            _move(inner, name, folder, target, stale)
    return file


@contextlib.contextmanager
def _private_folder(folder: int) -> Iterator[int]:
    """A new folder in ``folder`` that only root can enter. It is removed afterwards if it is empty, and never emptied:
    its name may be that of another folder by then.
    """
    name = _fresh_name()
    os.mkdir(name, 0o700, dir_fd=folder)
    try:
        fd = os.open(name, os.O_RDONLY | _FOLDER, dir_fd=folder)
        try:
            _require_new(fd, os.fstat(folder).st_dev)
            _remove_acl(fd, "default")
            yield fd
        finally:
            os.close(fd)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=folder)


def _fresh_name() -> str:
    return f".graft-{os.urandom(8).hex()}"


def _require_new(fd: int, device: int) -> None:
    """Whoever may write to the folder may have put another one at the name of Graft's. Raises PermissionError."""
    status = os.fstat(fd)
    is_roots = status.st_uid == os.geteuid() and not status.st_mode & 0o077
    if is_roots and status.st_dev == device:
        with os.scandir(fd) as entries:
            if next(entries, None) is None:
                return
    raise PermissionError(errno.EPERM, "somebody replaced a folder of Graft's")


def _remove_acl(file: int | str, kind: str) -> None:
    """Remove an ACL that a file has of its folder: it would let others in besides its owner and its mode (acl(5)).

    Raises OSError.
    """
    try:
        os.removexattr(file, f"system.posix_acl_{kind}")
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):  # there is none; the file system knows none
            raise


@contextlib.contextmanager
def _bound_inside(sock: socket.socket, private: int, shown: bytes) -> Iterator[tuple[int, bytes, FileId]]:
    """Bind ``sock`` to ``shown`` with the folder ``private`` as root. Gives the folder and the name of its file, and
    the file. Only what was made here is removed afterwards: the file if it is there still, and folders that are empty.
    """
    *parents, name = [part for part in shown.split(b"/") if part]
    with contextlib.ExitStack() as made:
        inner = private
        for part in parents:
            os.mkdir(part, 0o700, dir_fd=inner)
            made.callback(_remove_empty, part, inner)
            inner = os.open(part, os.O_RDONLY | _FOLDER, dir_fd=inner)
            made.callback(os.close, inner)
        _in_root(private, sock, shown)
        file = _file_at(name, inner)
        if file is None:
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        try:
            yield inner, name, file
        finally:
            with contextlib.suppress(OSError):
                if _file_at(name, inner) == file:
                    os.unlink(name, dir_fd=inner)


def _remove_empty(name: bytes, folder: int) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=folder)


def _file_at(name: str | bytes, folder: int) -> FileId | None:
    """The socket with that name; None: it is something else. Raises OSError."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def _in_root(root: int, sock: socket.socket, shown: bytes) -> None:
    """Call bind() in a thread with a root directory of its own. Raises OSError."""
    failed: list[OSError] = []

    def work() -> None:
        try:
            syscall("unshare", _CLONE_FS)  # before all else: what follows is about this thread alone
            os.fchdir(root)
            os.chroot(".")
            sock.bind(shown)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _move(inner: int, name: bytes, folder: int, target: Target, stale: FileId | None) -> None:
    """Rename the socket into its place, which is free, or has the dead socket ``stale``. Raises UnixPathError."""
    wanted = os.fsencode(target.name)
    if stale is None:
        try:
            syscall("renameat2", inner, name, folder, wanted, _RENAME_NOREPLACE)
        except FileExistsError:
            raise _taken(target) from None
        return
    try:
        syscall("renameat2", inner, name, folder, wanted, _RENAME_EXCHANGE)
    except FileNotFoundError:
        _move(inner, name, folder, target, None)  # somebody removed it just now
        return
    if _file_at(name, inner) != stale:
        _give_back(inner, name, folder, wanted)
        raise _taken(target)
    os.unlink(name, dir_fd=inner)


def _give_back(inner: int, name: bytes, folder: int, wanted: bytes) -> None:
    """Somebody put something else at ``wanted`` before it was exchanged: it gets its name again. If that fails,
    because the socket was taken away there, it gets a new name: whatever it is, it is not Graft's to remove.
    """
    try:
        syscall("renameat2", inner, name, folder, wanted, _RENAME_EXCHANGE)
    except OSError:
        syscall("renameat2", inner, name, folder, os.fsencode(_fresh_name()), _RENAME_NOREPLACE)


def _taken(target: Target) -> UnixPathError:
    return UnixPathError(errno.EADDRINUSE, f"{target.path}: somebody else took this path just now", "another path")


def remove(path: str, file: FileId) -> bool:
    """Remove the socket ``file`` from ``path``; whether it was there. Safe to repeat."""
    with contextlib.suppress(UnixPathError, OSError), folder_of(path) as folder:
        name = os.path.basename(path)
        if _file_at(name, folder) == file:
            os.unlink(name, dir_fd=folder)
            return True
    return False


def pin_own_descriptors() -> None:
    """Keep /proc/self/fd open until this process ends, so that the names on the way there stay in the kernel's cache:
    `connect` looks them up, and who opens something by its descriptor. Every user may list /proc/PID, and so hold it,
    and whoever looks up there what is not in the cache waits for him. (The folder fd itself only root may list.)

    Once for each process: safe to repeat.
    """
    if _pinned_by[0] != os.getpid():
        os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        _pinned_by[0] = os.getpid()


def connect(sock: socket.socket, path: str, cached: bool = False) -> bool:
    """Connect ``sock``, which never blocks, to the socket at ``path``: never through a link. Raises OSError.

    ``cached``: only if the kernel knows the path without reading, and so without waiting for a folder's lock; False
    where it does not. (`pin_own_descriptors` comes before that.) BlockingIOError: the server's backlog is full, and no
    event says when it has room.
    """
    try:
        fd = _openat2(path, os.O_PATH | os.O_NOFOLLOW, _RESOLVE_CACHED if cached else 0)
    except BlockingIOError:
        if cached:
            return False
        raise
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        sock.connect(f"/proc/self/fd/{fd}")
        return True
    finally:
        os.close(fd)
