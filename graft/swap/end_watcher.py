"""Tells a supervisor that waits for a notification that there will be none, or that its holder is gone.

The notification descriptor could be polled together with the holder's pidfd, at the cost of a system call for every
trapped one. Instead the supervisor waits in SECCOMP_IOCTL_NOTIF_RECV itself, and a thread of its own, which otherwise
sleeps, gets it out of there with a signal. A kernel before 6.11 would leave it waiting when its container is gone.
"""

from __future__ import annotations

import contextlib
import select
import signal
import threading
from collections.abc import Iterator

_WAKE = signal.SIGUSR1
_AGAIN = 0.01  # seconds


class EndWatcher:
    """Whether to stop."""

    def __init__(self, listener: int, holder: int) -> None:
        self.has_come = False
        self._poll = select.poll()
        self._poll.register(listener, 0)
        self._poll.register(holder, select.POLLIN)
        self._left = threading.Event()
        self._waits = threading.get_ident()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, the calling thread, the main one, is signalled when the end comes."""
        before = signal.signal(_WAKE, lambda signum, frame: None)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()  # with every signal blocked: they are the main thread's
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            yield
        finally:
            self._left.set()
            if self.has_come:
                thread.join()
            signal.signal(_WAKE, before)

    def _watch(self) -> None:
        self._poll.poll()
        self.has_come = True
        # A signal that comes just before the other thread waits is lost: so again, until it has left.
        while not self._left.is_set():
            signal.pthread_kill(self._waits, _WAKE)
            self._left.wait(_AGAIN)
