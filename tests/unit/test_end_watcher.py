"""A supervisor that waits where it cannot look around is told that the end has come."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from graft.swap.end_watcher import EndWatcher


def _wait_like_a_supervisor(ending: EndWatcher, pause: float) -> None:
    while not ending.has_come:
        time.sleep(pause)  # a signal's handler runs, and the rest of the pause follows: only the flag ends the loop


@pytest.mark.parametrize("end", ["listener", "holder"])
def test_the_end_comes_by_a_listener_without_processes_and_by_a_holder_that_is_gone(end: str) -> None:
    listener, container = os.pipe()
    holder, other = os.pipe()
    ending = EndWatcher(listener, holder)
    threads = threading.active_count()
    with ending.watched():
        assert not ending.has_come
        os.close(container if end == "listener" else other)
        _wait_like_a_supervisor(ending, 0.01)
    assert threading.active_count() == threads
    for fd in (listener, holder, other if end == "listener" else container):
        os.close(fd)


def test_a_call_that_never_returns_by_itself_is_interrupted_again_and_again() -> None:
    holder, other = os.pipe()
    never, kept = os.pipe()
    heard = []
    ending = EndWatcher(never, holder)
    with ending.watched():
        signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
        os.close(other)
        while len(heard) < 3:
            time.sleep(0.01)
    for fd in (holder, never, kept):
        os.close(fd)


def test_a_notification_that_waits_does_not_end_anything() -> None:
    listener, container = os.pipe()
    holder, other = os.pipe()
    ending = EndWatcher(listener, holder)
    with ending.watched():
        os.write(container, b"x")
        time.sleep(0.05)
        assert not ending.has_come
        os.close(other)
        _wait_like_a_supervisor(ending, 0.01)
    for fd in (listener, holder, container):
        os.close(fd)
