"""Calls about a file in a folder that somebody else may hold, in a child process that can be left behind.

Who may read a folder can keep its lock for as long as he likes: getdents64(2) into a page of memory that never comes
(FUSE, userfaultfd). Whoever looks a name up there, or makes or removes one, then waits, and cannot be killed. So Graft
does that in a child. If it does not finish in time, the child is killed and left behind (left_children.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from typing import TypeVar

from graft.kernel.unix_files import UnixPathError
from graft.state import helper_process
from graft.state.left_children import LeftChildren

T = TypeVar("T")

_TIMEOUT = 1.0  # seconds
_EXIT_TIMEOUT = 0.1  # after it was killed: it is waited for later

_left = LeftChildren()


def in_folder_of(path: str, work: Callable[[], T], keep: Collection[int] = ()) -> T:
    """The result of ``work``, which must be picklable; the child has the descriptors ``keep``.

    Raises what ``work`` raises, and UnixPathError where the folder is held.
    """
    folder = os.path.dirname(path)
    if _left.has_one(folder):
        raise _held(path, folder)

    def attempt() -> tuple[list[T], Exception | None]:
        try:
            return [work()], None
        except Exception as error:
            return [], error

    found = helper_process.run_each(lambda _: attempt(), (None,), _TIMEOUT, keep=keep, exit_timeout=_EXIT_TIMEOUT)
    _left.note([folder], found.results, found.helper_pid)
    if 0 not in found.results:
        raise _held(path, folder)
    results, error = found.results[0]
    if error is not None:
        raise error
    return results[0]


def left_in(path: str) -> int:
    """The child that this process has left in the folder of ``path``; 0: none."""
    return _left.child_in(os.path.dirname(path))


def _held(path: str, folder: str) -> UnixPathError:
    return UnixPathError(
        errno.EBUSY, f"{path}: somebody holds the directory {folder}", f"let only root read it: chmod 0711 {folder}"
    )
