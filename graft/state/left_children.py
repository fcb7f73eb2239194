"""Child processes that were left behind, each of them about a folder that somebody holds (folder_calls.py).

Until the child has gone, and for a while at least, nothing more is tried in that folder: a folder has one such child at
most, and costs whoever asks one timeout now and then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence

_REST = 10.0  # seconds without another attempt


class LeftChildren:
    """The children that the calling process has left behind, by folder."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[int, float]] = {}
        self._exiting: set[int] = set()

    def has_one(self, folder: str) -> bool:
        """Whether nothing is to be tried in that folder now."""
        self._reap()
        return folder in self._left

    def child_in(self, folder: str) -> int:
        """The child that hung there; 0: none."""
        return self._left.get(folder, (0, 0.0))[0]

    def leave(self, folder: str, pid: int) -> None:
        """Note that a child hung there; ``pid`` is 0 if it has exited all the same."""
        self._left[folder] = pid, time.monotonic() + _REST

    def note(self, folders: Sequence[str], answered: Collection[int], child: int) -> None:
        """Note what a child was asked about, which of it (by index) it has answered, and its process id, 0 if it has
        exited.
        """
        for index, folder in enumerate(folders):
            if index not in answered:
                self.leave(folder, child)
        if len(answered) == len(folders):
            self.reap_later(child)

    def reap_later(self, pid: int) -> None:
        """Note that a child has answered, and is exiting."""
        if pid:
            self._exiting.add(pid)

    def _reap(self) -> None:
        for pid in list(self._exiting):
            if _is_gone(pid):
                self._exiting.discard(pid)
        for folder, (pid, until) in list(self._left.items()):
            if time.monotonic() >= until and (not pid or _is_gone(pid)):
                del self._left[folder]


def _is_gone(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:  # a fork of the process that started it
        return True
