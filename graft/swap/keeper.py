"""The keeper of one container's listener: sees to it that a supervisor serves it.

A notification descriptor that nobody holds turns every trapped call into ENOSYS. So there are always two
that hold it: the supervisor, and whoever has this object. A supervisor that dies is started again with the
same listener and the same journal. One that outlives its holder ends the container and cleans up, or, where
Graft did not start the container, carries on and cleans up at the end.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from graft.errors import KernelError
from graft.kernel import cgroup, netns, process
from graft.kernel.pidfd import has_ended
from graft.kernel.seccomp import Listener, hung_up
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.state.endpoints import Endpoints
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap.call_log import line
from graft.swap.desk import give_back, open_desk
from graft.swap.resource_limits import enter_own_cgroup
from graft.swap.socket_pool import NamespaceSwitch, SocketPool
from graft.swap.supervisor import LogEntry, Supervisor, serve

_MAX_RESTARTS, _IN_SECONDS = 10, 5.0
_DYING_SECONDS = 5.0
_dying: list[int] = []  # supervisors of this process that were killed, and that have not been waited for


class Keeper:
    """A container's listener and its supervisor's process.

    ``outlive`` is what a supervisor whose holder died does at its own end, after it has served on. Without
    it, it ends the container at once.
    """

    def __init__(
        self,
        settings: Settings,
        container: Container,
        listener: int,
        verbose: bool,
        outlive: Callable[[Installation], None] | None = None,
    ) -> None:
        self._settings, self._container, self._verbose, self._outlive = settings, container, verbose, outlive
        self._listener = listener
        self._journal = mmap.mmap(-1, mmap.PAGESIZE)
        self._started: list[float] = []
        self.pid = 0

    def start(self) -> None:
        """Start a supervisor, the first or the next one. Raises KernelError if they die one after the other."""
        now = time.monotonic()
        self._started = [moment for moment in self._started if now - moment < _IN_SECONDS] + [now]
        if len(self._started) > _MAX_RESTARTS:
            raise KernelError(f"the supervisor of {self._container.name} died {_MAX_RESTARTS} times in a row")
        holder = os.pidfd_open(os.getpid())
        self.pid = os.fork()
        if self.pid == 0:
            self._supervise(holder)
        os.close(holder)

    def hung_up(self) -> bool:
        """Whether every process under the listener's filter is gone."""
        return hung_up(self._listener)

    def reap(self) -> bool:
        """Whether the supervisor has died; its process is then waited for."""
        if not self.pid or os.waitpid(self.pid, os.WNOHANG)[0] != self.pid:
            return False
        self.pid = 0
        return True

    def _supervise(self, holder: int) -> None:
        """The supervisor's process. Never returns."""
        settings, container, listener = self._settings, self._container, Listener(self._listener)
        code = 1
        try:
            _leave_the_terminal(self._verbose)
            process.close_all_but({self._listener, holder})
            process.raise_descriptor_limit()
            graft = Installation(settings)
            living = [one.id for one in graft.containers.listing()]
            enter_own_cgroup(settings, container.id, container.cgroup_path, living)
            namespaces = NamespaceSwitch(settings.host_netns, lambda cookie: _namespace_path(graft, container, cookie))
            gc.freeze()  # what is loaded now stays: the collector need not look at it on the way of a call
            tell = _teller(graft.endpoints) if self._verbose else None
            desk = open_desk(graft, container.id)
            pool = SocketPool(graft.maps.tags, desk, container.id, namespaces)
            supervisor = Supervisor(graft.maps.tags, desk, pool, listener, tell)
            serve(supervisor, listener, self._journal, holder)
            if has_ended(holder):
                self._survive(graft, supervisor, listener)
            give_back(graft.maps)
            code = 0
        except BaseException:
            if os.environ.get("GRAFT_DEBUG"):
                traceback.print_exc()
        finally:
            os._exit(code)

    def _survive(self, graft: Installation, supervisor: Supervisor, listener: Listener) -> None:
        """What is left to do without a holder."""
        if self._outlive is None:
            end_container(graft, self._container)
            return
        never = os.eventfd(0, os.EFD_CLOEXEC)
        serve(supervisor, listener, self._journal, never)
        self._outlive(graft)

    def stop(self) -> None:
        """End the supervisor. The container's processes must be gone: their calls would fail from here on.

        One that waits in the kernel for what another container keeps from it (a socket that the two share) is left to
        die when it can: whoever has this object has other containers too.
        """
        pid, self.pid = self.pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _dying.append(pid)
        deadline = time.monotonic() + _DYING_SECONDS
        while pid in _still_dying() and time.monotonic() < deadline:
            time.sleep(0.002)
        with contextlib.suppress(OSError):
            os.close(self._listener)


def _still_dying() -> list[int]:
    """The supervisors that were killed and are not dead yet. Those that are have been waited for."""
    for pid in list(_dying):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _dying.remove(pid)
    return _dying


def end_container(graft: Installation, container: Container) -> None:
    """End every process of a container that Graft started, and leave nothing of it behind."""
    path = container.cgroup_path
    if path.exists():
        cgroup.kill(path)
    with graft.transaction() as change:
        change.containers.remove(container)
    if path.exists():
        cgroup.remove(path)


def _leave_the_terminal(verbose: bool) -> None:
    """A session of its own: no ^C, no hang-up, and no pipe of the user's kept open."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if verbose or os.environ.get("GRAFT_DEBUG") else (0, 1, 2):
        os.dup2(null, fd)


def _namespace_path(graft: Installation, container: Container, cookie: int) -> Path | None:
    """Where a namespace that is not the host's can be entered: the container's own, or an endpoint's."""
    if cookie == container.netns:
        for pid in cgroup.processes(container.cgroup_path):
            path = Path(f"/proc/{pid}/ns/net")
            with contextlib.suppress(OSError):
                if netns.cookie(path) == cookie:
                    return path
        return None
    for stored in graft.endpoints.listing():
        if stored.cookie == cookie:
            return graft.endpoints.netns_path(stored)
    return None


def _teller(endpoints: Endpoints) -> Callable[[LogEntry], None]:
    """Prints a line for each call, in the words that AF_GRAFT's users watched for."""

    def tell(told: LogEntry) -> None:
        print(printable(line(told, endpoints.by_id())), file=sys.stderr, flush=True)

    return tell
