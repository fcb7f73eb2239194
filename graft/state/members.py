"""The processes and the cgroups of containers, as the kernel lists them now.

A process of a container can hold the folder of its cgroup, or of one below it, so that whoever lists it waits and
cannot be killed (folder_calls.py). So a child lists them, with a timeout. A folder that is held is not tried again by
the same command. Others can hold a folder above, and then whoever looks the cgroup up waits, by its name or by its id.
So a child does that too, before the installation's lock is taken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from graft.datapath import attachments
from graft.errors import KernelError
from graft.kernel import cgroup
from graft.model.settings import Settings
from graft.state import helper_process
from graft.state.left_children import LeftChildren
from graft.state.records import Container

T = TypeVar("T")

_TIMEOUT = 2.0  # seconds without an answer about any cgroup
_EXIT_TIMEOUT = 0.1

_left = LeftChildren()
_left_above = LeftChildren()
"""By the path of the cgroup that was asked about, one of whose folders above is held."""


@dataclass(frozen=True, slots=True)
class Members:
    """The processes of a cgroup and of those below it, and the ids of all these cgroups. ``are_all``: there is no
    socket that was made in a cgroup that was below it and is gone.
    """

    pids: tuple[int, ...]
    cgroups: frozenset[int]
    are_all: bool = True


def of_each(paths: Sequence[Path]) -> dict[Path, Members]:
    """What is in each of these cgroups; those of which a folder is held are left out."""
    free = [path for path in paths if not _left.has_one(str(path))]
    found = helper_process.run_each(_list, free, _TIMEOUT, exit_timeout=_EXIT_TIMEOUT)
    _left.note([str(path) for path in free], found.results, found.helper_pid)
    return {path: found.results[index] for index, path in enumerate(free) if index in found.results}


def inside(path: Path) -> Members:
    """What is in a cgroup. Raises KernelError where a folder is held."""
    found = of_each([path]).get(path)
    if found is None:
        raise held(str(path))
    return found


def processes(path: Path) -> tuple[int, ...]:
    """The processes of a cgroup and of those below it. Raises KernelError where a folder is held."""
    return inside(path).pids


def gone(containers: Sequence[Container]) -> frozenset[int]:
    """The numbers of those containers whose cgroup is gone. One that cannot be asked about, because a folder above is
    held, counts as there.
    """
    free = [one for one in containers if not _left_above.has_one(one.cgroup)]
    found = helper_process.run_each(lambda one: one.exists, free, _TIMEOUT, exit_timeout=_EXIT_TIMEOUT)
    _left_above.note([one.cgroup for one in free], found.results, found.helper_pid)
    return frozenset(free[index].id for index, exists in found.results.items() if not exists)


def without_hooks(settings: Settings, containers: Sequence[Container]) -> frozenset[int]:
    """The numbers of those containers whose cgroups lack hooks, by what the kernel has attached now. One that cannot be
    asked about, because a folder above is held, counts as having them.
    """
    free = [one for one in containers if not _left_above.has_one(one.cgroup)]
    found = helper_process.run_each(
        lambda one: attachments.lacks_programs(settings, one.cgroup_path, one.cgroup_id, one.is_relayed),
        free,
        _TIMEOUT,
        exit_timeout=_EXIT_TIMEOUT,
    )
    _left_above.note([one.cgroup for one in free], found.results, found.helper_pid)
    return frozenset(free[index].id for index, lacks in found.results.items() if lacks)


@contextlib.contextmanager
def pinned(path: Path) -> Iterator[bool]:
    """Keep a cgroup open while the block runs, which takes the installation's lock: its name, and those of the folders
    above it, stay in the kernel's cache, so that to look them up waits for nobody.

    False where a folder above is held: the block must not look it up.
    """
    opened = _open_apart(path, _open_folder)
    try:
        yield opened is not None
    finally:
        for fd in opened or ():
            os.close(fd)


@contextlib.contextmanager
def within_reach(path: Path) -> Iterator[None]:
    """`pinned`, for a block that has to look the cgroup up. Raises KernelError where a folder above is held."""
    with pinned(path) as reachable:
        if not reachable:
            raise KernelError(f"somebody holds a directory above the cgroup {path}", "end what runs there")
        yield


def open_events(path: Path) -> int:
    """A descriptor of a cgroup's cgroup.events. As long as it is open, what `pinned` says of the names is true.

    Raises KernelError where the folder is held or one above it, FileNotFoundError.
    """
    opened = _open_apart(path, partial(cgroup.open_events, number=0))
    if opened is None:
        raise held(str(path))
    if not opened:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return opened[0]


def _open_apart(path: Path, opening: Callable[[Path], int]) -> list[int] | None:
    """What a child opens of a cgroup: one descriptor, none where it is not there. None where a folder is held."""
    if _left_above.has_one(str(path)):
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        asked = helper_process.run_each(
            lambda one: _send_opened(one, opening, theirs),
            (path,),
            _TIMEOUT,
            keep={theirs.fileno()},
            exit_timeout=_EXIT_TIMEOUT,
        )
        _left_above.note([str(path)], asked.results, asked.helper_pid)
        if 0 not in asked.results:
            return None
        return socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)[1] if asked.results[0] else []


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _send_opened(path: Path, opening: Callable[[Path], int], outbox: socket.socket) -> bool:
    """Open something at ``path`` and send its descriptor. False where there is none."""
    try:
        fd = opening(path)
    except OSError:
        return False
    socket.send_fds(outbox, [b"."], [fd])
    os.close(fd)
    return True


def answer_about(what: str, work: Callable[[], T], timeout: float = _TIMEOUT) -> T:
    """The result of ``work``, by a child: it looks into folders of ``what`` that somebody may hold.

    Raises what ``work`` raises, KernelError where it does not answer; then nothing is asked about ``what`` for a while.
    """
    asked = None
    if not _left.has_one(what):
        asked = helper_process.run_each(lambda _: work(), (None,), timeout, exit_timeout=_EXIT_TIMEOUT)
        _left.note([what], asked.results, asked.helper_pid)
    if asked is None or 0 not in asked.results:
        raise KernelError(f"somebody holds a directory of {what}", "end what holds it")
    return asked.results[0]


def held(path: str) -> KernelError:
    """The error where the folder of the cgroup at ``path`` is held."""
    return KernelError(f"somebody holds the directory of the cgroup {path}, or one below it", "end what runs there")


def _list(path: Path) -> Members:
    return Members(tuple(cgroup.processes(path)), cgroup.ids(path), not cgroup.dying_below(path))
