"""Holds the listener of one container, and sees to it that a supervisor serves it.

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
from collections.abc import Callable, Sequence

from graft import containers, store
from graft.allowance import enter_own_cgroup
from graft.births import Births, Namespaces
from graft.containers import Container
from graft.desk import give_back, open_desk
from graft.errors import KernelError
from graft.kernel import cgroup, process
from graft.kernel.pidfd import is_over, pidfd_open
from graft.kernel.seccomp import Listener, hung_up
from graft.maps import Maps
from graft.printable import printable
from graft.settings import Settings
from graft.supervisor import Supervisor, Told, serve

_MAX_RESTARTS, _IN_SECONDS = 10, 5.0
_DYING_SECONDS = 5.0
_dying: list[int] = []  # supervisors of this process that were killed, and that have not been waited for


class Holder:
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
        outlive: Callable[[Maps], None] | None = None,
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
        holder = pidfd_open(os.getpid())
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
            process.allow_descriptors()
            living = [one.id for one in containers.listing(settings)]
            enter_own_cgroup(settings, container.id, container.cgroup_path, living)
            maps = Maps(settings.pin_dir)
            namespaces = Namespaces(settings.host_netns, lambda cookie: _namespace_path(settings, container, cookie))
            gc.freeze()  # what is loaded now stays: the collector need not look at it on the way of a call
            tell = _teller(settings) if self._verbose else None
            desk = open_desk(settings, maps, container.id)
            births = Births(maps.tags, desk, container.id, namespaces)
            supervisor = Supervisor(maps.tags, desk, births, listener, tell)
            serve(supervisor, listener, self._journal, holder)
            if is_over(holder):
                self._survive(maps, supervisor, listener)
            give_back(maps)
            code = 0
        except BaseException:
            if os.environ.get("GRAFT_DEBUG"):
                traceback.print_exc()
        finally:
            os._exit(code)

    def _survive(self, maps: Maps, supervisor: Supervisor, listener: Listener) -> None:
        """What is left to do without a holder."""
        if self._outlive is None:
            end(self._settings, maps, self._container)
            return
        never = os.eventfd(0, os.EFD_CLOEXEC)
        serve(supervisor, listener, self._journal, never)
        self._outlive(maps)

    def stop(self) -> None:
        """`stop_all` of this one."""
        stop_all([self])

    def _kill(self) -> int:
        pid, self.pid = self.pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _dying.append(pid)
        return pid

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._listener)


def stop_all(holders: Sequence[Holder]) -> None:
    """End their supervisors. The container's processes must be gone: their calls would fail from here on.

    Those that wait in the kernel for what another container keeps from them (a socket that the two share) are left to
    die when they can, however many there are: whoever has these objects has other containers too.
    """
    killed = {one._kill() for one in holders}
    deadline = time.monotonic() + _DYING_SECONDS
    while not killed.isdisjoint(_still_dying()) and time.monotonic() < deadline:
        time.sleep(0.002)
    for one in holders:
        one._let_go()


def _still_dying() -> list[int]:
    """The supervisors that were killed and are not dead yet. Those that are have been waited for."""
    for pid in list(_dying):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _dying.remove(pid)
    return _dying


def end(settings: Settings, maps: Maps, container: Container) -> None:
    """End every process of a container that Graft started, and leave nothing of it behind."""
    path = container.cgroup_path
    if path.exists():
        cgroup.kill(path)
    containers.remove(settings, maps, container)
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


def _namespace_path(settings: Settings, container: Container, cookie: int):  # type: ignore[no-untyped-def]
    """Where a namespace that is not the host's can be entered: the container's own, or an endpoint's."""
    if cookie == container.netns:
        for pid in cgroup.processes(container.cgroup_path):
            from pathlib import Path

            from graft.kernel import netns

            path = Path(f"/proc/{pid}/ns/net")
            with contextlib.suppress(OSError):
                if netns.cookie(path) == cookie:
                    return path
        return None
    for stored in store.listing(settings):
        if stored.cookie == cookie:
            return store.netns_path(settings, stored)
    return None


def _teller(settings: Settings):  # type: ignore[no-untyped-def]
    """Prints a line for each call, in the words that AF_GRAFT's users watched for."""

    def tell(told: Told) -> None:
        from graft.told import line

        names = {stored.id: stored.endpoint for stored in store.listing(settings)}
        print(printable(line(told, names)), file=sys.stderr, flush=True)

    return tell
