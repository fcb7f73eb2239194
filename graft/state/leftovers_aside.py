"""Closes what outlives containers (leftovers.py), for a process that serves others meanwhile and waits for no socket.

    a container has ended ── a child: anything left? ── closes that ── anything left? ...

A child is not waited for: by how many sockets there are, strangers decide how long a listing takes, and who has a
socket can keep it locked; then it is not closed, and the child cannot be killed. So there are so many children and no
more; further containers wait until one of them has ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from graft.kernel import sockets
from graft.model.transport import Transport
from graft.state import helper_process, leftovers, origins
from graft.state.installation import Installation
from graft.state.origins import Place
from graft.state.records import Container

MOST_CHILDREN = 16
_MOST_WAITING = 64  # each has the namespaces of endpoints open


@dataclass(slots=True)
class _Ended:
    """A container that has ended, and where its sockets may be."""

    number: int
    place: Place
    opened: ExitStack


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
        cgroups = origins.of_ended(graft.settings, [container])
        with ExitStack() as stack:
            paths = stack.enter_context(graft.endpoints.namespaces(graft.endpoints.listing()))
            yield
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(_Ended(container.id, Place(tuple(paths), cgroups), stack.pop_all()))
        self.go_on()

    def go_on(self) -> None:
        """To be called when a child may have ended."""
        for pid in [pid for pid in self._children if os.waitpid(pid, os.WNOHANG) != (0, 0)]:
            self._children.pop(pid).opened.close()
        while self._waiting and len(self._children) < MOST_CHILDREN:
            ended = self._waiting[0]
            try:
                child = self._close(ended)
            except OSError:  # no process can be made: it is tried again when it is called next
                return
            self._waiting.pop(0)
            if child:
                self._children[child] = ended
            else:
                ended.opened.close()

    def _close(self, ended: _Ended) -> int:
        """Start a child that closes what is left; its process id, 0 where it has ended. Raises OSError."""
        settings, prefix = self._graft.settings, leftovers.prefix_of(ended.number)
        return helper_process.run_each(
            lambda place: leftovers.close_in_child(settings, place, prefix), (ended.place,), 0, keep_running=True
        ).helper_pid
