"""Which network namespaces the threads of a container's processes are in.

A namespace belongs to a thread: without any privilege one thread of a process may leave (unshare(2), in a user
namespace of the process's own) while the others stay where they were; or the first one ends. A pidfd shows the first
thread's namespace only (setns(2)). So each thread is looked at in /proc, by a child, because others can hold a folder
there (folder_calls.py).

Processes that start meanwhile are looked at too, a few times: a program may start some faster than they are listed. And
of one whose folder somebody holds only the first thread is known. What a thread that is not found does in the host's
namespace is judged all the same, by the hooks (bpf/owner.bpf.c).

Sources: network_namespaces(7), unshare(2), proc_pid_task(5), proc_pid_ns(5).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from graft.kernel import netns, tasks
from graft.state import helper_process, members

_TIMEOUT = 2.0  # seconds without an answer about any process
_LONGEST = 5.0
_ROUNDS = 5


def of_container(path: Path, pids: Iterable[int], wanted: int) -> dict[int, int]:
    """How many processes have threads in which network namespace, by its inode: of the processes ``pids``, which were
    in the cgroup at ``path``, and of those that start there meanwhile. A process counts in each namespace that its
    threads are in; none that has ended.

    No more are looked for when the namespace ``wanted`` is among them. Raises KernelError where a folder of the cgroup
    is held.
    """
    counts: Counter[int] = Counter()
    known: set[int] = set()
    new = set(pids)
    for _ in range(_ROUNDS):
        known |= new
        found = _of_each(sorted(new))
        counts.update(inode for inodes in found.values() for inode in inodes)
        counts.update(netns.inodes_of(new - found.keys()))
        if wanted in counts:
            break
        new = set(members.processes(path)) - known
        if not new:
            break
    return dict(counts)


def _of_each(pids: list[int]) -> dict[int, frozenset[int]]:
    """The namespaces of each of these processes, none of one that has ended; without those that do not answer."""
    found = helper_process.run_each(of_process, pids, _TIMEOUT, longest=_LONGEST).results
    return {pids[index]: inodes for index, inodes in found.items()}


def of_process(pid: int) -> frozenset[int]:
    """The inodes of the namespaces of a process's threads, also of those that start meanwhile. May never return."""
    found: set[int] = set()
    known: set[int] = set()
    for _ in range(_ROUNDS):
        new = set(tasks.threads(pid)) - known
        if not new:
            break
        known |= new
        for tid in new:
            with contextlib.suppress(OSError):  # it has ended
                found.add(os.stat(f"/proc/{pid}/task/{tid}/ns/net").st_ino)
    return frozenset(found)
