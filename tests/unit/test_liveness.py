"""A supervisor is judged by what the kernel says of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from graft import liveness
from graft.kernel import tasks
from tests.support.wait import until


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that waits for a second that never comes, as a supervisor does for a call."""
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
    activity = tasks.activity(sleeper)
    assert activity is not None and activity.parent == os.getpid() and activity.switches > 0


def test_threads_that_share_their_descriptors_are_looked_at_once() -> None:
    assert tasks.tables(os.getpid()) == [os.getpid()]
    assert tasks.threads(os.getpid())[0] == os.getpid()
