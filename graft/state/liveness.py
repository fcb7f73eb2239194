"""Whether a supervisor is stuck, by its state in /proc: no request is sent to it, so that no answer can be missing.

A container can block its own supervisor, in a call that takes the lock of one of the container's sockets or reads the
container's memory. Such a process sleeps uninterruptibly, and uses no CPU time.

A child reads /proc: whoever may list the folder of a process there can hold it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from graft.kernel import tasks
from graft.state import helper_process

_DURATION, _INTERVAL = 1.0, 0.05
_TIMEOUT = 2.0  # seconds


def stuck(pids: Sequence[int], seconds: float = _DURATION) -> frozenset[int]:
    """Those of ``pids`` that sleep uninterruptibly, or are stopped, and have not run for ``seconds``.

    Returns as soon as none of them may be stuck.
    """
    if not pids:
        return frozenset()
    return helper_process.run_one(lambda: _stuck(pids, seconds), seconds + _TIMEOUT) or frozenset()


def _stuck(pids: Iterable[int], seconds: float) -> frozenset[int]:
    first = {pid: tasks.activity(pid) for pid in pids}
    suspects = {pid: activity for pid, activity in first.items() if activity is not None and activity.may_be_stuck}
    deadline = time.monotonic() + seconds
    while suspects and time.monotonic() < deadline:
        time.sleep(_INTERVAL)
        suspects = {pid: activity for pid, activity in suspects.items() if tasks.activity(pid) == activity}
    return frozenset(suspects)
