"""Other processes and their threads, as /proc shows them. None of these files needs a lock of theirs.

(/proc/PID/cmdline, environ and maps, and fdinfo of some descriptors, do: they are not read for a container's
processes.) But to find a file, its folder is searched: whoever may list /proc/PID can hold that one, as any folder
(graft/state/folder_calls.py). So what must not wait calls this in a child (graft/state/helper_process.py), as commands
do; a supervisor calls it itself, for its own container.

Sources: proc_pid_stat(5), proc_pid_status(5), proc_pid_fd(5), kcmp(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from graft.kernel.syscalls import syscall

_KCMP_FILES = 2
_EQUAL, _LESS, _GREATER = 0, 1, 2
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_STATE = re.compile(rb"^State:\t([A-Za-z])", re.M)
_NUMBERS = re.compile(rb"^(PPid|voluntary_ctxt_switches|nonvoluntary_ctxt_switches):\t([0-9]{1,20})$", re.M)
_THREAD_GROUP = re.compile(rb"^Tgid:\t([0-9]{1,10})$", re.M)
_FILE_IDS = re.compile(rb"^(?:Uid|Gid):(?:\t[0-9]{1,10}){3}\t([0-9]{1,10})$", re.M)
_EFFECTIVE_GROUP = re.compile(rb"^Gid:\t[0-9]{1,10}\t([0-9]{1,10})\t", re.M)
_GROUPS = re.compile(rb"^Groups:\t([0-9 ]*)$", re.M)
_STUCK_STATES = frozenset("DTt")


def threads(pid: int) -> list[int]:
    """The threads of a process, the main thread first, even if it has ended; empty where the process has ended."""
    with contextlib.suppress(OSError):
        return sorted((int(tid) for tid in os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))
    return []


def descriptor_tables(pid: int) -> list[int]:
    """A thread of a process for each descriptor table that its threads have (nearly always one table).

    The kernel orders the tables, so that a thousand of them are compared quickly. Where it does not
    (CONFIG_KCMP), every thread counts.
    """
    found: list[int] = []
    for tid in threads(pid):
        low, high = 0, len(found)
        while low < high:
            middle = (low + high) // 2
            order = _compare_tables(tid, found[middle])
            if order == _EQUAL:
                break
            low, high = (low, middle) if order == _LESS else (middle + 1, high)
        else:
            found.insert(low, tid)
    return found


def _compare_tables(one: int, other: int) -> int:
    try:
        return syscall("kcmp", one, other, _KCMP_FILES, 0, 0)
    except OSError:
        return _GREATER


def open_sockets(tid: int) -> Iterator[tuple[int, int]]:
    """(inode, descriptor) of each socket in the table of thread ``tid``."""
    with contextlib.suppress(OSError), os.scandir(f"/proc/{tid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                match = _SOCKET.fullmatch(os.readlink(entry.path))
                if match:
                    yield int(match[1]), int(entry.name)


@dataclass(frozen=True, slots=True)
class Activity:
    """What a thread does: its state (a letter), its parent, and its number of context switches."""

    state: str
    parent: int
    switches: int

    @property
    def may_be_stuck(self) -> bool:
        """Whether it is in uninterruptible sleep, or stopped."""
        return self.state in _STUCK_STATES


def activity(pid: int) -> Activity | None:
    """What the main thread of a process does now; None where it has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            return parse_activity(status.read())
    except OSError:
        return None


# In /proc/PID/status the name, which the program chooses, comes first; the kernel writes a newline in it as two
# characters.


def parse_activity(status: bytes) -> Activity | None:
    """What a thread does, from its /proc/TID/status; None where that has not all fields."""
    state = _STATE.search(status)
    numbers = {found[1]: int(found[2]) for found in _NUMBERS.finditer(status)}
    if state is None or len(numbers) < 3:
        return None
    switches = numbers[b"voluntary_ctxt_switches"] + numbers[b"nonvoluntary_ctxt_switches"]
    return Activity(state[1].decode(), numbers[b"PPid"], switches)


def parse_thread_group(status: bytes) -> int:
    """The process id of a thread, from its /proc/TID/status; 0 where it is missing."""
    found = _THREAD_GROUP.search(status)
    return int(found[1]) if found else 0


def parse_file_ids(status: bytes) -> tuple[int, int]:
    """User and group of the files that a thread makes, from its /proc/TID/status. Raises ProcessLookupError."""
    found = _FILE_IDS.findall(status)
    if len(found) < 2:
        raise ProcessLookupError(errno.ESRCH, "a thread's ids not found")
    return int(found[0]), int(found[1])


def parse_groups(status: bytes) -> tuple[int, tuple[int, ...]]:
    """Effective and supplementary groups of a thread, from its /proc/TID/status. Raises ProcessLookupError."""
    effective, groups = _EFFECTIVE_GROUP.search(status), _GROUPS.search(status)
    if effective is None or groups is None:
        raise ProcessLookupError(errno.ESRCH, "a thread's groups not found")
    return int(effective[1]), tuple(int(one) for one in groups[1].split())
