"""The keeper closes unix sockets by a child: it may have the last copy of one with a descriptor in its queue."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from graft.keeper import closing
from graft.keeper.closing import Closer
from graft.kernel import unix_rights
from tests.unit.test_splice_closing import LINGER, ends, sent_to, took

IGNORES_CHILDREN = """
import signal, socket, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from graft.keeper.closing import Closer
closer = Closer()
for _ in range(3):
    closer.close([socket.socketpair()[0].detach()])
    closer.finish()
    time.sleep(0.1)
"""


@pytest.fixture
def closer() -> Iterator[Closer]:
    made = Closer()
    yield made
    for pid in made._children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def is_open(fd: int) -> bool:
    """Whether there is such a descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_the_last_copies_of_sockets_with_descriptors_in_their_queues_are_closed_at_once(closer: Closer) -> None:
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(20)]
        readers = [stack.enter_context(sent_to(stack.enter_context(peer), 60)) for _, peer in pairs]
        start = time.monotonic()
        closer.close([ours.detach() for ours, _ in pairs])
        closer.finish()
        assert took(start) < 10
        assert all(ends(reader) for reader in readers)
        assert took(start) < 30


def test_control_closed_by_the_keeper_itself_one_takes_as_long_as_it_lingers() -> None:
    ours, peer = socket.socketpair()
    with peer, sent_to(peer):
        start = time.monotonic()
        os.close(ours.detach())
        assert took(start) > LINGER / 2


def test_those_of_one_turn_are_closed_together_and_not_too_many(
    closer: Closer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "_BATCH", 3)
    fds = [one.detach() for _ in range(2) for one in socket.socketpair()]
    for fd in fds[:2]:
        closer.close([fd])
    assert all(is_open(fd) for fd in fds)
    closer.close([fds[2]])
    assert [is_open(fd) for fd in fds] == [False, False, False, True]
    closer.close([fds[3]])
    closer.finish()
    assert not is_open(fds[3])


def test_what_has_no_descriptors_in_its_queue_is_closed_without_a_child(
    closer: Closer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a child"))
    fds = [*os.pipe(), socket.socket().detach()]
    if unix_rights.refused_by_kernel():
        refusing = socket.socket(socket.AF_UNIX)
        unix_rights.refuse(refusing)
        fds.append(refusing.detach())
    closer.close(fds)
    closer.finish()
    assert not any(is_open(fd) for fd in fds)


def test_where_no_child_can_be_made_they_wait_for_the_next_one(closer: Closer, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, peer = socket.socketpair()
    fd = ours.detach()
    with peer:
        for name, value in ((os, "fork"), (closing, "_MAX_CHILDREN")):
            with monkeypatch.context() as failing:
                failing.setattr(name, value, 0 if name is closing else lambda: os.stat("/none"))
                closer.close([fd] if name is os else [])
                closer.finish()
            assert is_open(fd)
        closer.finish()
        assert not is_open(fd)


def test_children_that_the_kernel_reaps_are_no_error() -> None:
    assert subprocess.run([sys.executable, "-c", IGNORES_CHILDREN]).returncode == 0
