"""Closes what outlives containers (leftovers.py), for a process that serves others meanwhile and waits for no socket.

    a container has ended ── anything left? ── a child closes that ── has it ended? ── anything left? ...

A child is not waited for: who has a socket can keep it locked, and then it is not closed, and the child cannot be
killed. So there are so many children and no more; what further containers have left waits until one of them has ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from graft.kernel import sockets
from graft.model.transport import Transport
from graft.state import leftovers
from graft.state.installation import Installation
from graft.state.records import Container

_ROUNDS = 3  # whoever has a listener may accept what waits there until that is closed
MOST_CHILDREN = 16
_MOST_WAITING = 16  # each has the namespaces of endpoints open


@dataclass(slots=True)
class _Ended:
    """A container that has ended: where its sockets may be, and how often that is still looked at."""

    number: int
    paths: Sequence[Path]
    opened: ExitStack
    rounds: int = _ROUNDS


class LeftoversAside:
    """What is left of the containers that a process has served, closed by its children."""

    def __init__(self, graft: Installation) -> None:
        self._graft = graft
        self._children: dict[int, _Ended] = {}
        self._waiting: list[_Ended] = []

    @contextlib.contextmanager
    def closed_after(self, graft: Installation, container: Container) -> Iterator[None]:
        """As `leftovers.closed_after`, but what is left is closed later, by children and `go_on`."""
        if container.transport is Transport.SPLICE or not sockets.can_destroy():
            yield
            return
        with ExitStack() as stack:
            paths = stack.enter_context(graft.endpoints.namespaces(graft.endpoints.listing()))
            yield
            ended = _Ended(container.id, paths, stack.pop_all())
        if self._is_full and (len(self._waiting) >= _MOST_WAITING or not self._left_of(ended)):
            ended.opened.close()
        else:
            self._waiting.append(ended)
        self.go_on()

    def go_on(self) -> None:
        """To be called when a child may have ended."""
        for pid in [pid for pid in self._children if os.waitpid(pid, os.WNOHANG) != (0, 0)]:
            self._waiting.append(self._children.pop(pid))
        while self._waiting and not self._is_full:
            ended = self._waiting.pop(0)
            child = self._close(ended)
            if child:
                self._children[child] = ended
            else:
                ended.opened.close()

    @property
    def _is_full(self) -> bool:
        return len(self._children) >= MOST_CHILDREN

    def _close(self, ended: _Ended) -> int:
        """Start a child that closes what is left; its process id, 0 where nothing is left, or there was too often."""
        while ended.rounds:
            ended.rounds -= 1
            left = self._left_of(ended)
            if not left:
                return 0
            from graft.state import helper_process  # nearly never needed

            child = helper_process.run_each(leftovers.destroy, left, timeout=0, keep_running=True).helper_pid
            if child:
                return child
        return 0

    def _left_of(self, ended: _Ended) -> list[leftovers.Left]:
        with contextlib.suppress(OSError):
            return leftovers.left_of(self._graft.settings, ended.paths, ended.number)
        return []
