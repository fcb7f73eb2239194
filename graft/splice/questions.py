"""What the daemon asks about folders of the kernel that a container can hold: its cgroups, its processes' in /proc.

Whoever holds one (graft/state/folder_calls.py) makes everybody who looks into it wait, and nobody who waits can be
killed. So a child looks, one for each question, and the container's own work goes on when it has answered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TypeVar

from graft.splice.jobs import Stepwise
from graft.state.helper_process import Question
from graft.state.left_children import LeftChildren
from graft.state.members import held

T = TypeVar("T")

_TIMEOUT = 2.0  # seconds; only the container's own work waits for them
_INTERVAL = 0.005
_AT_ONCE = 8  # as many children as that

_left = LeftChildren()
_asked: set[int] = set()


def ask(folder: str, work: Callable[[], T], keep: Collection[int] = ()) -> Stepwise[T]:
    """The result of ``work``, which is about the cgroup ``folder`` and must be picklable; the child has ``keep``.

    Raises what ``work`` raises, and KernelError where the folder is held.
    """
    deadline = time.monotonic() + _TIMEOUT
    while len(_asked) >= _AT_ONCE and time.monotonic() < deadline:
        yield _INTERVAL
    if _left.has_one(folder):
        raise held(folder)
    question = Question(work, keep)
    _asked.add(question.child)
    has_hung = False
    try:
        deadline = time.monotonic() + _TIMEOUT
        while not (found := question.answer()):
            if time.monotonic() > deadline:
                has_hung = True
                raise held(folder)
            yield _INTERVAL
        return found[0]
    finally:
        _asked.discard(question.child)
        pid = question.close()
        if has_hung:
            _left.leave(folder, pid)
        else:
            _left.reap_later(pid)
