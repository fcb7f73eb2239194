"""The keeper of one container's listener: starts its supervisor, and restarts one that has died.

When the last descriptor of a listener is closed, every trapped call fails with ENOSYS. So two processes have it open:
the supervisor and the one with the `Keeper`. A supervisor that dies is replaced by another one, with the same listener
and the same journal. When the keeper's process dies, the supervisor ends the container and cleans up, or, where Graft
did not start the container, serves it to its end and cleans up then.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from graft.datapath import layout
from graft.errors import KernelError
from graft.kernel import cgroup, netns, process
from graft.kernel.pidfd import has_ended
from graft.kernel.seccomp import Listener, hung_up
from graft.kernel.seccomp_filter import DATAGRAMS, PROTOCOLS, Protocols
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state import leftovers
from graft.state.endpoints import Endpoints
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap.birth import BirthEntry, SocketBirth
from graft.swap.call_log import format_entry
from graft.swap.desk import open_desk, release_desk
from graft.swap.fast_calls import CompiledStock, open_fast_calls
from graft.swap.ferry_client import FerryClient
from graft.swap.processes import Processes
from graft.swap.resource_limits import enter_own_cgroup
from graft.swap.socket_pool import NamespaceSwitch, SocketPool
from graft.swap.supervisor import LogEntry, Supervisor, serve
from graft.swap.unix_bind import UnixBinder

_MAX_RESTARTS, _IN_SECONDS = 10, 5.0
_KILL_TIMEOUT = 5.0
_killed: list[int] = []  # supervisors of this process that were killed, and not reaped yet


class Keeper:
    """A container's listener and its supervisor's process.

    ``clean_up`` is called by a supervisor whose keeper's process has died, when it has served the container to its
    end. Without it, such a supervisor ends the container at once. ``killable``: the listener's filter has the flag for
    which only a signal that kills ends the wait of a trapped call. ``datagrams``: in transport swap, UDP sockets are
    born.
    """

    def __init__(
        self,
        settings: Settings,
        container: Container,
        listener: int,
        verbose: bool,
        clean_up: Callable[[Installation], None] | None = None,
        killable: bool = False,
        datagrams: bool = False,
    ) -> None:
        self._settings, self._container, self._verbose, self._clean_up = settings, container, verbose, clean_up
        self._listener, self._killable, self._datagrams = listener, killable, datagrams
        self._journal = mmap.mmap(-1, mmap.PAGESIZE)
        self._starts: list[float] = []
        self.pid = 0

    def start(self) -> None:
        """Start a supervisor, the first or the next one. Raises KernelError if too many died within a short time."""
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < _IN_SECONDS] + [now]
        if len(self._starts) > _MAX_RESTARTS:
            raise KernelError(f"the supervisor of {self._container.name} died {_MAX_RESTARTS} times in a row")
        keeper = os.pidfd_open(os.getpid())
        self.pid = os.fork()
        if self.pid == 0:
            self._supervise(keeper)
        os.close(keeper)

    def hung_up(self) -> bool:
        """Whether every process under the listener's filter is gone."""
        return hung_up(self._listener)

    def reap(self) -> bool:
        """Whether the supervisor has died; it is reaped then."""
        if not self.pid or os.waitpid(self.pid, os.WNOHANG)[0] != self.pid:
            return False
        self.pid = 0
        return True

    def _supervise(self, keeper: int) -> None:
        """What the supervisor's process does. Never returns."""
        settings, container, listener = self._settings, self._container, Listener(self._listener)
        code = 1
        try:
            _detach_from_terminal(self._verbose)
            process.close_all_but({self._listener, keeper})
            process.raise_descriptor_limit()
            graft = Installation(settings)
            containers = [one.id for one in graft.containers.listing()]
            enter_own_cgroup(settings, container.id, container.cgroup_path, containers)
            namespaces = NamespaceSwitch(settings.host_netns, lambda cookie: _namespace_path(graft, container, cookie))
            gc.freeze()  # the collector then skips what is loaded now when it runs during a call
            protocols = _born_protocols(container, self._datagrams)
            supervisor = _make_supervisor(
                graft, container, listener, namespaces, protocols, self._verbose, self._killable
            )
            serve(supervisor, listener, self._journal, keeper)
            if has_ended(keeper):
                self._continue_without_keeper(graft, supervisor, listener)
            release_desk(graft.maps)
            code = 0
        except BaseException:
            if os.environ.get("GRAFT_DEBUG"):
                traceback.print_exc()
        finally:
            os._exit(code)

    def _continue_without_keeper(self, graft: Installation, supervisor: Supervisor, listener: Listener) -> None:
        """End the container, or serve it to its end and clean up."""
        if self._clean_up is None:
            end_container(graft, self._container)
            return
        never_ready = os.eventfd(0, os.EFD_CLOEXEC)
        serve(supervisor, listener, self._journal, never_ready)
        self._clean_up(graft)

    def stop(self) -> None:
        """`stop_all` of this one."""
        stop_all([self])

    def _kill(self) -> int:
        """Kill the supervisor; gives its process id, 0 where there is none."""
        pid, self.pid = self.pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _killed.append(pid)
        return pid

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._listener)


def stop_all(keepers: Sequence[Keeper]) -> None:
    """End their supervisors. The container's processes must be gone: their calls would fail from here on.

    Those that wait in the kernel for another container (for the lock of a socket that the two share) are waited for
    together, and not longer than a few seconds: the keepers' process may serve other containers too.
    """
    killed = {one._kill() for one in keepers}
    deadline = time.monotonic() + _KILL_TIMEOUT
    while not killed.isdisjoint(_reap_killed()) and time.monotonic() < deadline:
        time.sleep(0.002)
    for one in keepers:
        one._close()


def _reap_killed() -> list[int]:
    """Reap the supervisors that were killed; gives those that have not died yet."""
    for pid in list(_killed):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _killed.remove(pid)
    return _killed


def end_container(graft: Installation, container: Container) -> None:
    """End every process of a container that Graft started, and remove its rules, record and cgroup.

    What other processes have of its sockets is closed.
    """
    path = container.cgroup_path
    if path.exists():
        cgroup.kill(path)
    with leftovers.closed_after(graft, container), graft.transaction() as change:
        change.containers.remove(container)
    if path.exists():
        cgroup.remove(path)


def _detach_from_terminal(verbose: bool) -> None:
    """Start a session of its own, ignore the terminal's signals, and close the user's standard streams."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if verbose or os.environ.get("GRAFT_DEBUG") else (0, 1, 2):
        os.dup2(null, fd)


def _born_protocols(container: Container, datagrams: bool) -> Protocols:
    """Which sockets of a container are born on the host's stack."""
    if container.transport is Transport.BORN:
        return PROTOCOLS
    return DATAGRAMS if datagrams else {}


def _make_supervisor(
    graft: Installation,
    container: Container,
    listener: Listener,
    namespaces: NamespaceSwitch,
    protocols: Protocols,
    verbose: bool,
    killable: bool,
) -> Supervisor:
    """The supervisor of ``container`` in the calling process, with a desk of its own."""
    log = _call_logger(graft.endpoints) if verbose else None
    desk = open_desk(graft, container.id)
    is_born = container.transport is Transport.BORN
    netns = _own_namespace(namespaces, container) if protocols else ""  # else no socket(2) is trapped
    can_be_fast = not verbose and (killable or not is_born)  # a connect that is interrupted finds its socket replaced
    fast = open_fast_calls(listener.fd, container.transport, netns, desk) if can_be_fast else None
    stock = None if fast is None else CompiledStock(fast, container.transport)
    pool = SocketPool(graft.maps.tags, desk, container.id, namespaces, stock)
    processes = Processes()
    ferry = FerryClient(graft.settings, graft.maps, container, namespaces)
    needed = ferry if container.transport is Transport.SWAP else None
    may_ping = partial(_may_ping, graft, container)
    birth = SocketBirth(desk, pool, listener, processes, netns, protocols, needed, may_ping, log, killable, fast)
    unix = UnixBinder(graft, container.id)
    return Supervisor(graft.maps.tags, desk, pool, listener, processes, birth, ferry, log, unix, fast)


def _may_ping(graft: Installation, container: Container) -> bool:
    """Whether its policy has a rule for ICMP now."""
    value = graft.maps.containers.get(ctypes.c_uint32(container.id))
    return value is not None and bool(value.flags & layout.CONTAINER_ICMP)


def _own_namespace(namespaces: NamespaceSwitch, container: Container) -> str:
    """The name of the container's own network namespace, as /proc/PID/ns/net gives it.

    It stays open here: a name that is in use is given to no other namespace.
    """
    try:
        return f"net:[{os.fstat(namespaces.open(container.netns)).st_ino}]"
    except OSError:
        return ""


def _namespace_path(graft: Installation, container: Container, cookie: int) -> Path | None:
    """The path of a namespace that is not the host's: the container's own, or an endpoint's."""
    if cookie == container.netns:
        for pid in cgroup.each_process(container.cgroup_path):
            with contextlib.suppress(OSError):
                if netns.cookie(pid) == cookie:
                    return Path(f"/proc/{pid}/ns/net")
        return None
    for stored in graft.endpoints.listing():
        if stored.cookie == cookie:
            return graft.endpoints.netns_path(stored)
    return None


def _call_logger(endpoints: Endpoints) -> Callable[[LogEntry | BirthEntry], None]:
    """A function that prints a line for each call."""

    def log(entry: LogEntry | BirthEntry) -> None:
        print(printable(format_entry(entry, endpoints.by_id())), file=sys.stderr, flush=True)

    return log
