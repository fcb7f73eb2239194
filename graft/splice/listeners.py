"""What a container listens on now, and which cgroups are its own. In steps: it may have any number of listeners."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from graft.errors import GraftError, NotFoundError
from graft.kernel import cgroup
from graft.kernel.sockdiag import Diagnostics, ListeningSocket
from graft.splice.event_loop import EventLoop, nobody
from graft.splice.jobs import Stepwise
from graft.splice.publication import PublicationPlan
from graft.splice.questions import ask

_STEP_ITEMS = 16


class ContainerCgroups:
    """The ids of a container's cgroup and of those below it that have listeners. (The kernel lists a socket with the id
    of the cgroup it was made in.)

    A cgroup stays below the one that it was made in, and its id is not used again. So the tree is listed only when a
    listener is in a cgroup that was not seen before.
    """

    def __init__(self, path: Path, root: int, log: Callable[[str], None]) -> None:
        self._path, self._root, self._log = path, root, log
        self.own: frozenset[int] = frozenset([root] if root else [])
        self.others: frozenset[int] = frozenset()
        """Those of other sockets of the namespace, when the tree was listed last."""
        self.problem = ""
        """Why the tree could not be listed, "" if it was."""

    def look_up(self, unknown: Collection[int]) -> Stepwise[bool]:
        """Find out about cgroups that are not known to be the container's; whether `own` has changed."""
        before = self.own
        if self.others.issuperset(unknown) and (self.own or self._root):
            return False
        try:
            self.own = yield from ask(str(self._path), partial(cgroup_ids, self._path, self._root))
        except (GraftError, OSError) as error:
            self._note(error.message if isinstance(error, GraftError) else str(error))
            return False
        self.problem, self.others = "", frozenset(unknown) - self.own
        return self.own != before

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            self._log(problem)
        self.problem = problem


def cgroup_ids(path: Path, root: int) -> frozenset[int]:
    """The ids of a cgroup and of all below it.

    Raises NotFoundError where the cgroup at ``path`` has another id than ``root`` (0: any).
    """
    found = cgroup.ids(path)
    if not found or (root and root not in found):
        raise NotFoundError(f"the cgroup {path} is gone")
    return found


def _pieces(pieces: Iterator[list[ListeningSocket]], loop: EventLoop) -> Iterator[list[ListeningSocket]]:
    """Of a listing. How long the kernel looks for one depends on the sockets of the whole machine, of which its tables
    are, and not on the container's: that is no slow call of the container.
    """
    while True:
        started = time.monotonic()
        piece = next(pieces, None)
        loop.blame(started, nobody)
        if piece is None:
            return
        yield piece


def collect_listeners(
    diagnostics: Diagnostics,
    plan: PublicationPlan,
    loop: EventLoop,
    skip_ports: Collection[int],
    storage: int | None = None,
    read: Callable[[ListeningSocket], ListeningSocket] = lambda listener: listener,
) -> Stepwise[None]:
    """Add every listener to ``plan``, but those on ``skip_ports``; each as ``read`` returns it, which gets its value in
    the socket storage map ``storage``. Raises OSError.
    """
    for piece in _pieces(diagnostics.listeners(storage), loop):
        yield
        for number, listener in enumerate(piece, 1):
            if listener.port not in skip_ports:
                plan.add(read(listener))
            if number % _STEP_ITEMS == 0:
                yield


def collect_datagram_sockets(diagnostics: Diagnostics, plan: PublicationPlan, loop: EventLoop) -> Stepwise[None]:
    """Add every UDP socket of the namespace to ``plan``. Raises OSError."""
    for piece in _pieces(diagnostics.datagram_sockets(), loop):
        yield
        for number, one in enumerate(piece, 1):
            plan.add_datagram_socket(one)
            if number % _STEP_ITEMS == 0:
                yield
