"""Waiting for a condition, instead of sleeping for a fixed time."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = float(os.environ.get("GRAFT_TEST_PATIENCE", "1"))
"""Multiplies every deadline of a test, for machines that are many times slower (tests/vm)."""


def until(what: str, condition: Callable[[], T], timeout: float = 15, pause: float = 0.01) -> T:
    """Poll ``condition`` until its result is true; gives that result. Fails the test at the deadline."""
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout * PATIENCE:.0f} s: {what}")
        time.sleep(pause)


def kill(pid: int) -> None:
    """Kill a process, and wait until it is dead, whoever reaps it."""
    process, poll = os.pidfd_open(pid), select.poll()
    os.kill(pid, signal.SIGKILL)
    poll.register(process, select.POLLIN)
    poll.poll()
    os.close(process)
