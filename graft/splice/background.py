"""Calls that wait for somebody else (a lock, another process), made in threads: the event loop goes on meanwhile.

Not for what keeps the processor busy, which would take it from the loop: threads of one interpreter take turns.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable
from typing import TypeVar

from graft.splice.event_loop import EventLoop

T = TypeVar("T")


class Background:
    """Threads, and the way back from them into ``loop``."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._ended: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.watch(self._event, select.EPOLLIN, self._on_event)

    def run(self, call: Callable[[], T], done: Callable[[T | None, Exception | None], None]) -> None:
        """Make ``call`` in a thread; then ``done`` is called in the loop, with its result or what it raised.

        A thread that cannot be had is an OSError for ``done``.
        """

        def work() -> None:
            try:
                result = call()
            except Exception as error:
                self._come_back(lambda error=error: done(None, error))  # type: ignore[misc]
            else:
                self._come_back(lambda: done(result, None))

        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:
            cause = OSError(str(error))
            self._loop.later(lambda: done(None, cause))

    def _come_back(self, call: Callable[[], None]) -> None:
        self._ended.put(call)
        os.eventfd_write(self._event, 1)

    def _on_event(self, _mask: int) -> None:
        os.eventfd_read(self._event)
        while not self._ended.empty():
            self._ended.get()()

    def close(self) -> None:
        """Hear of no thread any more; those that wait still end with the process."""
        self._loop.unwatch(self._event)
