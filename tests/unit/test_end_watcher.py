"""A supervisor that waits in a system call is stopped when its container or its keeper has ended."""

from __future__ import annotations

import os
import select
import signal
import threading

import pytest

from graft.swap.end_watcher import EndWatcher
from tests.support.wait import until


def wait_until_stopped(watcher: EndWatcher) -> None:
    """Wait in one system call after the other, each of which continues after a signal: only the flag ends the loop."""
    while not watcher.should_stop:
        select.select([], [], [], 0.01)


@pytest.mark.parametrize("end", ["listener", "keeper"])
def test_it_stops_when_the_last_process_is_gone_and_when_the_keeper_is(end: str) -> None:
    listener, container = os.pipe()
    keeper, other = os.pipe()
    watcher = EndWatcher(listener, keeper)
    threads = threading.active_count()
    with watcher.running():
        assert not watcher.should_stop
        os.close(container if end == "listener" else other)
        wait_until_stopped(watcher)
    assert threading.active_count() == threads
    for fd in (listener, keeper, other if end == "listener" else container):
        os.close(fd)


def test_a_call_that_does_not_return_is_interrupted_repeatedly() -> None:
    keeper, other = os.pipe()
    silent, open_end = os.pipe()
    signals = []
    watcher = EndWatcher(silent, keeper)
    with watcher.running():
        signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
        os.close(other)
        until("three signals", lambda: len(signals) >= 3)
    for fd in (keeper, silent, open_end):
        os.close(fd)


def test_a_pending_notification_stops_nothing() -> None:
    listener, container = os.pipe()
    keeper, other = os.pipe()
    watcher = EndWatcher(listener, keeper)
    os.write(container, b"x")
    assert watcher._poll.poll(0) == []
    with watcher.running():
        assert not watcher.should_stop
        os.close(other)
        wait_until_stopped(watcher)
    for fd in (listener, keeper, container):
        os.close(fd)
