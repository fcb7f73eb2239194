"""Work that is done once, in a child: the pages that it writes to are gone with the child."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from typing import TypeVar

from graft.errors import KernelError

ResultT = TypeVar("ResultT")


def in_child(work: Callable[[], ResultT]) -> ResultT:
    """The result of ``work``, by a child: picklable. Raises what it raised, or KernelError where the child died."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _work(work, writer)
    os.close(writer)
    with open(reader, "rb") as answer:
        raw = answer.read()
    os.waitpid(child, 0)
    if not raw:
        raise KernelError("a process of Graft's has died")
    result, error = pickle.loads(raw)
    if error is not None:
        raise error
    found: ResultT = result
    return found


def _work(work: Callable[[], ResultT], writer: int) -> None:
    """The child's side. Never returns."""
    try:
        signal.set_wakeup_fd(-1)
        try:
            raw = pickle.dumps((work(), None))
        except Exception as error:
            raw = pickle.dumps((None, error))
        with open(writer, "wb") as answer:
            answer.write(raw)
    finally:
        os._exit(0)
