"""Whether a supervisor is stuck, by the kernel's account of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from graft.kernel import tasks
from graft.state import liveness
from tests.support.wait import until


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that sleeps, as a supervisor does while it waits for a call."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def test_one_that_waits_for_work_is_not_stuck(sleeper: int) -> None:
    assert liveness.stuck([sleeper, os.getpid()], 0.1) == frozenset()


def test_one_that_does_not_run_is_stuck_until_it_does(sleeper: int) -> None:
    os.kill(sleeper, signal.SIGSTOP)
    until("it is stopped", lambda: (tasks.activity(sleeper) or tasks.Activity("", 0, 0)).state == "T")
    assert liveness.stuck([sleeper, os.getpid()], 0.1) == frozenset({sleeper})
    os.kill(sleeper, signal.SIGCONT)
    assert liveness.stuck([sleeper], 0.1) == frozenset()


def test_one_that_is_gone_is_not_stuck() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert tasks.activity(process.pid) is None
    assert liveness.stuck([process.pid], 0.1) == frozenset()


def test_what_a_process_does_is_read_with_its_parent(sleeper: int) -> None:
    def asleep() -> tasks.Activity | None:
        activity = tasks.activity(sleeper)
        return activity if activity is not None and activity.switches else None

    activity = until("it has gone to sleep", asleep)
    assert activity is not None and activity.parent == os.getpid()


def test_threads_that_share_their_descriptors_are_looked_at_once() -> None:
    assert tasks.descriptor_tables(os.getpid()) == [os.getpid()]
    assert tasks.threads(os.getpid())[0] == os.getpid()


def test_threads_with_descriptors_of_their_own_are_each_looked_at() -> None:
    """A thread that leaves the table that it shared (unshare(CLONE_FILES)) shows in a child that does just that."""
    script = """
import ctypes, threading
libc, ready = ctypes.CDLL(None), threading.Barrier(5)
def run(own):
    if own: libc.unshare(0x400)
    ready.wait()
    threading.Event().wait()
for number in range(4):
    threading.Thread(target=run, args=(number % 2,), daemon=True).start()
ready.wait()
print("ready", flush=True)
threading.Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-ISc", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert len(tasks.threads(process.pid)) == 5
        found = tasks.descriptor_tables(process.pid)
        assert len(found) == 3 and process.pid in found
    finally:
        process.kill()
        process.communicate()
