"""Whether a supervisor is at work or stuck, by what the kernel says of it: it is asked nothing, and need not answer.

A container can keep its own supervisor waiting, in a call that takes the lock of one of its sockets or reads its
memory. Such a process sleeps uninterruptibly, and does not run at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from graft.kernel import tasks

_SECONDS, _PAUSE = 1.0, 0.05


def stuck(pids: Iterable[int], seconds: float = _SECONDS) -> frozenset[int]:
    """Those of ``pids`` that sleep uninterruptibly, or are stopped, and have not run for as many seconds.

    Waits so long only if there is any that may be.
    """
    first = {pid: tasks.activity(pid) for pid in pids}
    left = {pid: activity for pid, activity in first.items() if activity is not None and activity.may_be_stuck}
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        left = {pid: activity for pid, activity in left.items() if tasks.activity(pid) == activity}
    return frozenset(left)
