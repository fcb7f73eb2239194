"""One container's course in the daemon: its namespace is found, its listeners are looked at again and again, it ends.

    found ──▶ look ──▶ pause ──▶ look ──▶ ...          each arrow into "look" and into "ended" is a job (jobs.py),
                          any time ──▶ ended            and there is one at a time

A look takes as long as the container makes it take. So the pause after it grows with it: all looks together have a
tenth of the daemon's time at the most, and each container has the same part of that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graft.datapath.maps import Maps
from graft.errors import GraftError, NotFoundError
from graft.model.printable import printable
from graft.splice.event_loop import EventLoop
from graft.splice.jobs import Job, Steps
from graft.splice.namespaces import Namespaces
from graft.splice.relays import Relays
from graft.splice.resources import Resources
from graft.splice.sockmap import Sockmap
from graft.state.records import Container

LOOK_SECONDS = 0.2
_LEISURE = 10

WhenDone = Callable[[BaseException | None], None]


def say(text: str) -> None:
    """A line in the daemon's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Context:
    """What the containers of one daemon are served with."""

    loop: EventLoop
    maps: Maps
    spaces: Namespaces
    room: Resources


class ContainerService:
    """Serves ``container`` until `end`."""

    def __init__(self, context: Context, container: Container, sockmap: Sockmap | None) -> None:
        self.container = container
        self._context, self._sockmap = context, sockmap
        self._pid = 0
        self._account = context.room.account(container.id)
        self._relays: Relays | None = None
        self._job: Job | None = None
        self._due = 0.0
        self._asked: list[WhenDone] = []
        self._answered: list[WhenDone] = []
        self._problem = ""

    @property
    def serves(self) -> bool:
        """Whether its namespace was found, and its relays are there."""
        return self._relays is not None

    def use(self, container: Container, sockmap: Sockmap | None) -> None:
        """Take note of a changed record, or of another way to relay."""
        self.container, self._sockmap = container, sockmap
        if self._relays is not None:
            self._relays.container = container
            self._relays.use(sockmap)

    def look_if_due(self) -> None:
        """Begin to look, where that has not been done for a while."""
        if self._job is None and time.monotonic() >= self._due:
            self._look()

    def look(self, pid: int, done: WhenDone) -> None:
        """Look now, or as soon as a look that is under way has ended; then call ``done``.

        ``pid`` is a process in its namespace, where one is known.
        """
        self._pid = pid
        self._asked.append(done)
        if self._job is None:
            self._look()

    def _look(self) -> None:
        self._answered, self._asked = self._asked, []
        self._job = Job(self._context.loop, self.container.id, self._steps(), self._looked)

    def _steps(self) -> Steps[None]:
        if self._relays is None:
            inside = yield from self._context.spaces.of_container(self.container, self._pid)
            self._relays = Relays(
                self._account, self._context.maps, self.container, self._context.spaces, inside, self._sockmap
            )
            say(f"{self.container.name}: served, container {self.container.id}")
        yield from self._relays.look()

    def _looked(self, error: BaseException | None) -> None:
        assert self._job is not None
        pause = _LEISURE * self._job.spent * self._context.room.members
        self._due = time.monotonic() + max(LOOK_SECONDS, pause)
        self._job = None
        self._note(error)
        for done in self._answered:
            done(error)
        if self._asked:
            self._look()

    def _note(self, error: BaseException | None) -> None:
        problem = "" if error is None else error.message if isinstance(error, GraftError) else str(error)
        if problem and problem != self._problem:
            say(f"{self.container.name}: {problem}")
        self._problem = problem

    def end(self, done: Callable[[], None]) -> None:
        """Stop to serve: listeners go, connections are reset. Then ``done`` is called."""
        if self._job is not None:
            self._job.stop()
        gone = NotFoundError(f"container {self.container.id} is no longer attached")
        for waiting in (*self._answered, *self._asked):
            waiting(gone)
        self._answered, self._asked = [], []

        def ended(error: BaseException | None) -> None:
            self._note(error)
            self._account.close()
            if self._relays is not None:
                say(f"{self.container.name}: no longer served")
            done()

        self._job = Job(self._context.loop, self.container.id, self._stop(), ended)

    def _stop(self) -> Steps[None]:
        if self._relays is not None:
            yield from self._relays.stop()

    def abandon(self) -> None:
        """Stop at once, with the daemon itself."""
        if self._job is not None:
            self._job.stop()
        for _ in self._stop():
            pass

    def describe(self) -> dict[str, Any]:
        """What `graft.splice.describe` tells of it, but for the daemon's pid."""
        if self._relays is not None:
            return {"serves": True, **self._relays.describe()}
        return {"serves": False, **({"problem": self._problem} if self._problem else {})}
