"""The processes and the cgroups of containers, as the kernel lists them now.

A process of a container can hold the folder of its cgroup, or of one below it, so that whoever lists it waits and
cannot be killed (folder_calls.py). So a child lists them, with a timeout. A folder that is held is not tried again by
the same command. Others can hold a folder above, and then whoever looks the cgroup up waits, by its name or by its id.
So a child does that too, before the installation's lock is taken.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.errors import KernelError
from graft.kernel import cgroup
from graft.state import helper_process
from graft.state.left_children import LeftChildren
from graft.state.records import Container

_TIMEOUT = 2.0  # seconds without an answer about any cgroup
_EXIT_TIMEOUT = 0.1

_left = LeftChildren()
_left_above = LeftChildren()
"""By the path of the cgroup that was asked about, one of whose folders above is held."""


@dataclass(frozen=True, slots=True)
class Members:
    """The processes of a cgroup and of those below it, and the ids of all these cgroups."""

    pids: tuple[int, ...]
    cgroups: frozenset[int]


def of_each(paths: Sequence[Path]) -> dict[Path, Members]:
    """What is in each of these cgroups; those of which a folder is held are left out."""
    free = [path for path in paths if not _left.has_one(str(path))]
    found = helper_process.run_each(_list, free, _TIMEOUT, exit_timeout=_EXIT_TIMEOUT)
    _left.note([str(path) for path in free], found.results, found.helper_pid)
    return {path: found.results[index] for index, path in enumerate(free) if index in found.results}


def processes(path: Path) -> tuple[int, ...]:
    """The processes of a cgroup and of those below it. Raises KernelError where a folder is held."""
    found = of_each([path]).get(path)
    if found is None:
        raise held(str(path))
    return found.pids


def gone(containers: Sequence[Container]) -> frozenset[int]:
    """The numbers of those containers whose cgroup is gone. One that cannot be asked about, because a folder above is
    held, counts as there.
    """
    free = [one for one in containers if not _left_above.has_one(one.cgroup)]
    found = helper_process.run_each(lambda one: one.exists, free, _TIMEOUT, exit_timeout=_EXIT_TIMEOUT)
    _left_above.note([one.cgroup for one in free], found.results, found.helper_pid)
    return frozenset(free[index].id for index, exists in found.results.items() if not exists)


@contextlib.contextmanager
def pinned(path: Path) -> Iterator[bool]:
    """Keep a cgroup open while the block runs, which takes the installation's lock: its name, and those of the folders
    above it, stay in the kernel's cache, so that to look them up waits for nobody.

    False where a folder above is held: the block must not look it up.
    """
    if _left_above.has_one(str(path)):
        yield False
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as stack, ours, theirs:
        asked = helper_process.run_each(
            lambda one: _send_opened(one, theirs), (path,), _TIMEOUT, keep={theirs.fileno()}, exit_timeout=_EXIT_TIMEOUT
        )
        _left_above.note([str(path)], asked.results, asked.helper_pid)
        if asked.results.get(0):
            for fd in socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)[1]:
                stack.callback(os.close, fd)
        yield 0 in asked.results


@contextlib.contextmanager
def within_reach(path: Path) -> Iterator[None]:
    """`pinned`, for a block that has to look the cgroup up. Raises KernelError where a folder above is held."""
    with pinned(path) as reachable:
        if not reachable:
            raise KernelError(f"somebody holds a directory above the cgroup {path}", "end what runs there")
        yield


def _send_opened(path: Path, outbox: socket.socket) -> bool:
    """Open the folder at ``path`` and send its descriptor. False where there is none."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    socket.send_fds(outbox, [b"."], [fd])
    os.close(fd)
    return True


def held(path: str) -> KernelError:
    """The error where the folder of the cgroup at ``path`` is held."""
    return KernelError(f"somebody holds the directory of the cgroup {path}, or one below it", "end what runs there")


def _list(path: Path) -> Members:
    return Members(tuple(cgroup.processes(path)), cgroup.ids(path))
