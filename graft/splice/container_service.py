"""How the daemon serves one container: it finds its namespace, scans its listeners again and again, and stops.

    namespace found ──▶ scan ──▶ pause ──▶ scan ──▶ ...     Each scan is a job (jobs.py), and so is the stop;
                              at any time ──▶ stopped       only one job runs at a time.

The container determines how long a scan takes. So the pause after a scan grows with it: all scans together take at
most a tenth of the daemon's time, and each container gets the same part of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graft.datapath.maps import Maps
from graft.errors import GraftError, NotFoundError
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.splice.connection import Connection
from graft.splice.event_loop import EventLoop
from graft.splice.jobs import Job, Stepwise
from graft.splice.log import ContainerLog, log
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.relays import Relays
from graft.splice.resources import DaemonResources
from graft.splice.sockmap import Sockmap
from graft.state.records import Container

SCAN_SECONDS = 0.2
_LONGEST_PAUSE = 10.0  # after a container could not be served again and again
_PAUSE_FACTOR = 10
_STEP_COUNTS = 32

Done = Callable[[BaseException | None], None]
"""Called when something has ended, with the error or None."""


@dataclass(frozen=True, slots=True)
class Context:
    """What all container services of one daemon share."""

    settings: Settings
    loop: EventLoop
    maps: Maps
    namespaces: Namespaces
    daemon_resources: DaemonResources


class ContainerService:
    """Serves ``container`` until `stop`."""

    def __init__(self, context: Context, container: Container, sockmap: Sockmap | None) -> None:
        self.container = container
        self._context, self._sockmap = context, sockmap
        self._pid = 0
        self._resources = context.daemon_resources.add_container(container.id)
        self._relays: Relays | None = None
        self._job: Job | None = None
        self._due = 0.0
        self._failures = 0
        """How often in a row no relays could be made."""
        self._scan_callbacks: list[Done] = []
        self._next_scan_callbacks: list[Done] = []
        """Called after the running scan; called after the next one."""
        self._problem, self._log = "", ContainerLog(container)
        self._is_counted = True
        """Whether nobody has asked for its traffic since what the kernel moves was counted."""

    @property
    def serves(self) -> bool:
        """Whether its namespace was found and its relays were made."""
        return self._relays is not None

    def update(self, container: Container, sockmap: Sockmap | None) -> None:
        """Use a changed record, or another relay."""
        self.container, self._sockmap = container, sockmap
        self._log.container = container
        if self._relays is not None:
            self._relays.container = container
            self._relays.set_sockmap(sockmap)

    def scan_if_due(self) -> None:
        """Start a scan if none runs and the pause is over."""
        if self._job is None and time.monotonic() >= self._due:
            self._start_scan()

    def scan(self, pid: int, done: Done) -> None:
        """Scan now, or as soon as the running scan has ended; then call ``done``.

        ``pid`` is a process in the container's namespace, 0 where none is known.
        """
        self._pid = pid
        self._next_scan_callbacks.append(done)
        if self._job is None:
            self._start_scan()

    def _start_scan(self) -> None:
        self._scan_callbacks, self._next_scan_callbacks = self._next_scan_callbacks, []
        self._job = Job(self._context.loop, self.container.id, self._scan(), self._scanned)

    def _scan(self) -> Stepwise[None]:
        if self._relays is None:
            container_netns = yield from self._find_netns()
            self._relays = Relays(
                self._context.settings,
                self._resources,
                self._context.maps,
                self.container,
                self._context.namespaces,
                container_netns,
                self._sockmap,
                self._log,
            )
            log(f"served, container {self.container.id}", self.container)
        yield from self._relays.update()
        if not self._is_counted:
            self._is_counted = True
            yield from self._count_kernel_bytes()

    def _count_kernel_bytes(self) -> Stepwise[None]:
        """Of connections that the relay in the kernel has: a system call for each direction."""
        for number, connection in enumerate(list(self._resources.connections), 1):
            if isinstance(connection, Connection):
                connection.count_kernel_bytes()
            if number % _STEP_COUNTS == 0:
                yield

    def _find_netns(self) -> Stepwise[NamespaceSockets]:
        namespaces = self._context.namespaces
        if self.container.transport is Transport.DIRECT:
            return namespaces.of_direct(self.container)
        inside = self._context.daemon_resources.kept.inside(self.container.id)
        return (yield from namespaces.of_container(self.container, self._pid, inside))

    def _scanned(self, error: BaseException | None) -> None:
        assert self._job is not None
        pause = _PAUSE_FACTOR * self._job.spent * self._context.daemon_resources.container_count
        self._failures = self._failures + 1 if self._relays is None else 0
        self._close_untaken()  # also where it could not be served: what nobody serves is not to listen
        retry = min(_LONGEST_PAUSE, SCAN_SECONDS * 2 ** min(self._failures, 10))
        self._due = time.monotonic() + max(retry, pause)
        self._job = None
        self._note_problem(error)
        for callback in self._scan_callbacks:
            callback(error)
        if self._next_scan_callbacks:
            self._start_scan()

    def _close_untaken(self) -> None:
        """What the graftd before has left of this container, and nobody wants now."""
        self._context.daemon_resources.kept.close_untaken(lambda found: found.record.container == self.container.id)

    def _note_problem(self, error: BaseException | None) -> None:
        problem = "" if error is None else error.message if isinstance(error, GraftError) else str(error)
        if problem and problem != self._problem:
            self._log(problem)
        self._problem = problem

    def stop(self, done: Callable[[], None]) -> None:
        """Close its listeners and reset its connections; then call ``done``."""
        if self._job is not None:
            self._job.stop()
        gone = NotFoundError(f"container {self.container.id} is no longer attached")
        for callback in (*self._scan_callbacks, *self._next_scan_callbacks):
            callback(gone)
        self._scan_callbacks, self._next_scan_callbacks = [], []
        self._close_untaken()

        def stopped(error: BaseException | None) -> None:
            self._note_problem(error)
            self._resources.close()
            if self._relays is not None:
                log("no longer served", self.container)
            done()

        self._job = Job(self._context.loop, self.container.id, self._stop(), stopped)

    def _stop(self) -> Stepwise[None]:
        if self._relays is not None:
            yield from self._relays.stop()

    def stop_now(self) -> None:
        """Stop without the event loop, when the daemon ends."""
        if self._job is not None:
            self._job.stop()
        for _ in self._stop():
            pass

    def traffic(self) -> dict[str, int]:
        """Its part of the answer of `client.traffic`. What the kernel moves is counted with the next scan."""
        self._is_counted = False
        counted = self._resources.traffic
        return {
            "connections": len(self._resources.connections),
            "connections_in": counted.connections_in,
            "connections_out": counted.connections_out,
            "bytes_in": counted.bytes_in,
            "bytes_out": counted.bytes_out,
        }

    def describe(self) -> dict[str, Any]:
        """The answer of `client.describe`, without the daemon's pid."""
        if self._relays is not None:
            waits = self._context.loop.waits(self.container.id)
            return {"serves": True, **self._relays.describe(), "waits": waits}
        return {"serves": False, **({"problem": self._problem} if self._problem else {})}
