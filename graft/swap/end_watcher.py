"""Stops a supervisor that waits for a notification: its container's last process is gone, or its keeper's process is.

The notification descriptor could be polled together with a pidfd of the keeper's process, at the cost of a system call
for each trapped call. Instead the supervisor's main thread waits in SECCOMP_IOCTL_NOTIF_RECV itself, and a second
thread, which sleeps until then, interrupts it with a signal. (Before 6.11 the kernel does not wake it when the last
process is gone.)
"""

from __future__ import annotations

import contextlib
import select
import signal
import threading
from collections.abc import Iterator

_SIGNAL = signal.SIGUSR1
_RESEND_SECONDS = 0.01


class EndWatcher:
    """Watches a listener and a pidfd of the keeper's process. ``should_stop``: one of them has ended."""

    def __init__(self, listener: int, keeper: int) -> None:
        self.should_stop = False
        self._poll = select.poll()
        self._poll.register(listener, 0)
        self._poll.register(keeper, select.POLLIN)
        self._stopped = threading.Event()
        self._main_thread = threading.get_ident()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch inside of the block, and signal the calling thread, the main one, when it should stop."""
        before = signal.signal(_SIGNAL, lambda signum, frame: None)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()  # with every signal blocked: they are the main thread's
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            yield
        finally:
            self._stopped.set()
            if self.should_stop:
                thread.join()
            signal.signal(_SIGNAL, before)

    def _watch(self) -> None:
        self._poll.poll()
        self.should_stop = True
        # A signal just before the main thread waits interrupts nothing, so it is sent until that thread has stopped.
        while not self._stopped.is_set():
            signal.pthread_kill(self._main_thread, _SIGNAL)
            self._stopped.wait(_RESEND_SECONDS)
