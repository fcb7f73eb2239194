"""The fork servers of an installation, from outside: which run, and their end."""

from __future__ import annotations

import contextlib
import os
import select
import signal

from graft.datapath.dataplane import forks_cgroup
from graft.kernel import cgroup
from graft.model.settings import Settings
from graft.swap import fork_client

_TIMEOUT = 5.0  # seconds


def running(settings: Settings) -> list[int]:
    """The processes of the servers. (Their children are in the same cgroup at first.)"""
    members = set(cgroup.processes(forks_cgroup(settings)))
    found = []
    for lock in fork_client.folder_of(settings).glob(f"*{fork_client.LOCK}"):
        with contextlib.suppress(OSError, ValueError):
            if (pid := int(lock.read_text())) in members:
                found.append(pid)
    return found


def stop_all(settings: Settings) -> None:
    """End the servers. Their children go on."""
    for pid in running(settings):
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # also one that is stopped; it has nothing to end
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll(_TIMEOUT * 1000)
            finally:
                os.close(pidfd)
