"""Tells the keeper that graftd works, so that one that hangs is killed and started again.

A thread of its own says so, as long as the event loop's own turn has come lately. One call of the kernel's can take
long though, and a container can have it take very long (docs/security.md): that must not get graftd killed. Then the
loop's thread is running, and none of it in user space, where graftd's own code would be caught in a loop.

    the loop's last turn     its thread since the last look            graftd
    lately                                                             works
    long ago                 runs, in the kernel alone                 works: it is in one long call
    long ago                 runs in user space, or waits              hangs: nothing is said

Where all of graftd is stopped (SIGSTOP), so is this thread.

The loop's thread is looked at by a file in /proc that is open from the start on, and read from its beginning each
time, so that the kernel writes it anew. Every user may list graftd's folders there, and so hold them: who opens the
file again waits for him, in the kernel, where the keeper cannot even kill graftd.

Sources: sd_watchdog_enabled(3), proc_pid_stat(5), traverse() and seq_read_iter() in fs/seq_file.c.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from graft.keeper import protocol
from graft.splice.descriptor_store import connected

_LOOKS = 6  # within the time after which the keeper kills graftd
_LATELY = 3  # looks
_MAX_STAT = 4096


class Activity(NamedTuple):
    """Of a thread: its state, as a letter, and how many ticks it has run in user space."""

    state: str
    user: int


def parse_activity(stat: str) -> Activity:
    """From /proc/PID/task/TID/stat: the third field, and the fourteenth."""
    fields = stat.rpartition(")")[2].split()
    return Activity(fields[0], int(fields[11]))


def works(since_turn: float, lately: float, before: Activity, now: Activity) -> bool:
    """Whether graftd works: the table above. Pure."""
    return since_turn < lately or (now.state == "R" and now.user == before.user)


def seconds(environment: Mapping[str, str]) -> float:
    """After how many seconds without a word the keeper kills this process; 0: never."""
    told, pid = environment.get(protocol.WATCHDOG_USEC, ""), environment.get(protocol.WATCHDOG_PID, "")
    if not (told.isascii() and told.isdigit()) or pid not in ("", str(os.getpid())):
        return 0.0
    return int(told) / 1e6


class Watchdog:
    """``told``: by the keeper, in the environment. ``last_turn`` gives when the loop's own turn was last, in the time
    of time.monotonic(). For the loop's thread. To be made before others have had the time to see this process.
    """

    def __init__(self, told: Mapping[str, str], last_turn: Callable[[], float]) -> None:
        self._pause, self._last_turn = seconds(told) / _LOOKS, last_turn
        self._ended = threading.Event()
        sock = connected(told)
        if self._pause and sock is not None:
            self._sock: socket.socket = sock
            path = f"/proc/self/task/{threading.get_native_id()}/stat"
            self._stat = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            threading.Thread(target=self._run, daemon=True).start()

    def _activity(self) -> Activity:
        return parse_activity(os.pread(self._stat, _MAX_STAT, 0).decode(errors="replace"))

    def continue_with(self, told: Mapping[str, str]) -> None:
        """Tell another keeper, by what that one told."""
        if self._pause:
            self._sock = connected(told) or self._sock

    def _run(self) -> None:
        before = self._activity()
        while not self._ended.wait(self._pause):
            now = self._activity()
            if works(time.monotonic() - self._last_turn(), _LATELY * self._pause, before, now):
                with contextlib.suppress(OSError):  # it has not read the last one yet
                    self._sock.send(protocol.encode({protocol.WATCHDOG: "1"}))
            before = now
        os.close(self._stat)

    def close(self) -> None:
        """Say nothing any more."""
        self._ended.set()
