"""Sockets that are bound at a path of the host, at an endpoint that is a unix socket.

    run_dir/unix/CONTAINER-ENDPOINT-X.bound  the file of a socket that a container has, or graftd for it, by both ids
    run_dir/unix/*.gone                      such a record, of a socket whose file is to be removed
    run_dir/unix/*.held                      next to it: the process that waits for the file's folder

All of it is root's only. The record of a socket is written before its file has the path; whoever removes the container,
the rule or the endpoint does that first and then releases what is recorded, whichever process has died meanwhile. So a
bind that is under way at that moment either finds its rule gone, or is found by its record. A record is kept until its
file is removed, or the process that was to put it there has ended without.

The file is removed when the installation's lock is not held any more: somebody may hold the file's folder
(folder_calls.py). Then the first change after he lets go tries again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from graft.errors import UsageError
from graft.kernel import unix_files
from graft.kernel.atomic_file import write_atomically
from graft.kernel.unix_files import FileId, Target, UnixPathError
from graft.model import json_text
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.model.unix_socket import UnixSocket
from graft.policy.model import Policy
from graft.state.folder_calls import in_folder_of, left_in
from graft.state.unix_sockets import Owner, folder, owner_of

_MAX_BYTES = 1 << 16
_MAX_NUMBER = (1 << 64) - 1
_BINDING_TIMEOUT, _BINDING_POLL = 0.2, 0.005  # seconds that a bind under way is waited for, and between two looks
_HELD_TIMEOUT = 60.0  # seconds after which a folder is tried again, though a process may still wait there


class _Record(NamedTuple):
    """``binder``: the process that puts the file there."""

    path: str
    file: FileId
    binder: int


def bind(
    settings: Settings,
    container: int,
    endpoint: int,
    sock: socket.socket,
    unix: UnixSocket,
    shown: bytes,
    is_granted: Callable[[], bool],
    owner: Owner = (0, 0),
    backlog: int | None = None,
) -> FileId:
    """Bind ``sock`` at an endpoint, for a container, and record that. ``owner``: where the operator named none.

    The socket shows the address ``shown``. With a ``backlog`` it listens before anybody can find it. ``is_granted``
    asks the maps whether the container still has the endpoint. Raises UnixPathError, NotFoundError, OSError.
    """
    uid, gid = owner_of(unix) or owner
    dead = in_folder_of(unix.path, lambda: unix_files.check(unix.path))
    if dead is not None and dead in _files_of_others(settings, container):
        hint = "an endpoint of its own for each"
        raise UnixPathError(errno.EADDRINUSE, f"{unix.path}: another container has it", hint)
    record = folder(settings) / f"{container}-{endpoint}-{os.urandom(8).hex()}.bound"
    target = Target(unix.path, uid, gid, unix.mode)
    try:
        file = in_folder_of(
            unix.path, lambda: _bind_and_record(sock, target, shown, backlog, record), keep={sock.fileno()}
        )
    except BaseException:
        _mark_gone(record)  # of a child that was left behind: it may put the file there yet
        raise
    if backlog is not None:
        sock.listen(backlog)  # again, by this process: its clients are shown who listened (SO_PEERCRED)
    _forget_others(settings, unix.path, record)
    if not (is_granted() and record.exists()):
        _mark_gone(record)
        remove_released(settings)
        raise UnixPathError(errno.EACCES, f"{unix.path}: its rule is gone")
    return file


def _bind_and_record(sock: socket.socket, target: Target, shown: bytes, backlog: int | None, record: Path) -> FileId:
    def note(file: FileId) -> None:
        text = {"path": target.path, "device": file[0], "inode": file[1], "binder": os.getpid()}
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(record, json.dumps(text).encode())

    try:
        return unix_files.bind(sock, target, shown, backlog, note)
    except BaseException:
        record.unlink(missing_ok=True)
        raise


def _files_of_others(settings: Settings, container: int) -> set[FileId]:
    own = f"{container}-"
    return {found.file for record, found in _records(settings, "*.bound") if not record.name.startswith(own)}


def _records(settings: Settings, pattern: str) -> Iterator[tuple[Path, _Record]]:
    for record in folder(settings).glob(pattern):
        with contextlib.suppress(UsageError, OSError, ValueError):
            yield record, _parse(record)


def _parse(record: Path) -> _Record:
    found = json_text.mapping(json_text.parse(record.read_bytes(), record.name, _MAX_BYTES), record.name)
    device, inode, binder = (
        json_text.number(found.get(key), key, _MAX_NUMBER) for key in ("device", "inode", "binder")
    )
    return _Record(json_text.path(found.get("path"), "path"), (device, inode), binder)


def _mark_gone(record: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        record.rename(record.with_suffix(".gone"))


def release(settings: Settings, is_gone: Callable[[int, int], bool]) -> None:
    """Have `remove_released` remove the files of each (container, endpoint) that ``is_gone``. Safe to repeat.

    To be called when the maps do not grant it any more.
    """
    for record in folder(settings).glob("*.bound"):
        with contextlib.suppress(OSError, ValueError):
            container, endpoint, _ = record.stem.split("-")
            if is_gone(int(container), int(endpoint)):
                _mark_gone(record)


def remove_released(settings: Settings) -> None:
    """Remove the files of released sockets. Without the installation's lock: it may take some seconds. Safe to repeat;
    what cannot be removed now keeps its record.
    """
    for record, found in _records(settings, "*.gone"):
        held = record.with_suffix(".held")
        if _waits(held):
            continue
        try:
            if _remove_file(found):
                record.unlink(missing_ok=True)
        except UnixPathError:
            if left_in(found.path):
                write_atomically(held, str(left_in(found.path)).encode())
        except OSError:
            pass


def _waits(held: Path) -> bool:
    """Whether a process that was left in the folder, by whichever process of Graft's, may still wait there."""
    try:
        is_recent = time.time() - held.stat().st_mtime < _HELD_TIMEOUT
        if is_recent and _exists(int(held.read_bytes())):
            return True
    except (OSError, ValueError):
        return False
    held.unlink(missing_ok=True)
    return False


def _remove_file(found: _Record) -> bool:
    """Whether a released socket's file is removed for good. Raises UnixPathError."""
    deadline = time.monotonic() + _BINDING_TIMEOUT
    while True:
        binding = _exists(found.binder)  # asked first: what it did before it ended is then found
        if in_folder_of(found.path, partial(unix_files.remove, found.path, found.file)) or not binding:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_BINDING_POLL)


def _exists(pid: int) -> bool:
    """Whether there is a process with that number, by a call that nobody can keep waiting."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return bool(pid)


def _forget_others(settings: Settings, path: str, own: Path) -> None:
    """A new socket has the path, and may have the inode number of an older one there."""
    for record, found in [*_records(settings, "*.bound"), *_records(settings, "*.gone")]:
        if found.path == path and record.stem != own.stem:
            record.unlink(missing_ok=True)


def check_free(policy: Policy, endpoints: Mapping[str, Endpoint]) -> None:
    """Raises UnixPathError where a socket could not be bound now at an endpoint that ``policy`` grants binds of, and
    NotFoundError where its owner does not exist.
    """
    for name in dict.fromkeys(rule.endpoint for rule in policy.every_ingress):
        unix = endpoints[name].unix
        if unix is not None:
            owner_of(unix)
            in_folder_of(unix.path, partial(unix_files.check, unix.path))
