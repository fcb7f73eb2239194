"""Calls that block (for a lock, another process), made in threads while the event loop continues.

Not for calls that keep the processor busy: threads of one interpreter take turns, so the loop would wait for them.
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
    """Runs calls in threads, and reports their results in ``loop``."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._finished: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.watch(self._event, select.EPOLLIN, self._on_event)

    def run(self, call: Callable[[], T], done: Callable[[T | None, Exception | None], None]) -> None:
        """Make ``call`` in a thread; then ``done`` is called in the loop, with its result or what it raised.

        Where no thread can be started, ``done`` gets an OSError.
        """

        def work() -> None:
            try:
                result = call()
            except Exception as error:
                self._post(lambda error=error: done(None, error))  # type: ignore[misc]
            else:
                self._post(lambda: done(result, None))

        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:
            cause = OSError(str(error))
            self._loop.later(lambda: done(None, cause))

    def _post(self, call: Callable[[], None]) -> None:
        self._finished.put(call)
        os.eventfd_write(self._event, 1)

    def _on_event(self, _mask: int) -> None:
        os.eventfd_read(self._event)
        while not self._finished.empty():
            self._finished.get()()
