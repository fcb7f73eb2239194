"""A supervisor that waits in a system call is interrupted when its container or its keeper has ended."""

from __future__ import annotations

import os
import select
import signal
import threading

import pytest

from graft.swap.end_watcher import EndWatcher
from tests.support.wait import until


def wait_like_a_supervisor(watcher: EndWatcher) -> None:
    """Wait in one system call after the other, each of which continues after a signal: only the flag ends the loop."""
    while not watcher.has_come:
        select.select([], [], [], 0.01)


@pytest.mark.parametrize("end", ["listener", "holder"])
def test_the_end_is_seen_when_the_listener_has_no_process_or_the_keeper_is_gone(end: str) -> None:
    listener, container = os.pipe()
    holder, other = os.pipe()
    watcher = EndWatcher(listener, holder)
    threads = threading.active_count()
    with watcher.watched():
        assert not watcher.has_come
        os.close(container if end == "listener" else other)
        wait_like_a_supervisor(watcher)
    assert threading.active_count() == threads
    for fd in (listener, holder, other if end == "listener" else container):
        os.close(fd)


def test_a_call_that_never_returns_by_itself_is_interrupted_again_and_again() -> None:
    holder, other = os.pipe()
    never, kept = os.pipe()
    signals = []
    watcher = EndWatcher(never, holder)
    with watcher.watched():
        signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
        os.close(other)
        until("three signals", lambda: len(signals) >= 3)
    for fd in (holder, never, kept):
        os.close(fd)


def test_a_notification_that_waits_is_not_the_end() -> None:
    listener, container = os.pipe()
    holder, other = os.pipe()
    watcher = EndWatcher(listener, holder)
    os.write(container, b"x")
    assert watcher._poll.poll(0) == []
    with watcher.watched():
        assert not watcher.has_come
        os.close(other)
        wait_like_a_supervisor(watcher)
    for fd in (listener, holder, container):
        os.close(fd)
