"""The process of a supervisor: what it has, where it runs, and what it does when its container or its keeper has ended.

It has nothing of the process that it was forked from but the descriptors in its `Supervision`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from graft.datapath import dataplane, layout
from graft.kernel import cgroup, netns, process
from graft.kernel.pidfd import has_ended
from graft.kernel.seccomp import Listener
from graft.kernel.seccomp_filter import DATAGRAMS, PROTOCOLS, Protocols
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state import call_times, leftovers
from graft.state.call_times import CallTimer
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


class Supervision(NamedTuple):
    """One supervisor's work. ``listener`` and ``keeper``, a pidfd, are descriptors; so are ``others``, which it keeps
    open besides.

    ``clean_up`` is called when the keeper has died, and the container was served to its end; without it the container
    is ended at once. ``killable``, ``datagrams``: as for `Keeper`.
    """

    settings: Settings
    container: Container
    listener: int
    journal: mmap.mmap
    keeper: int
    verbose: bool
    killable: bool
    datagrams: bool
    clean_up: Callable[[Installation], None] | None = None
    others: tuple[int, ...] = ()


def supervise(work: Supervision) -> NoReturn:
    """What a supervisor's process does, which was forked for it."""
    settings, container, listener = work.settings, work.container, Listener(work.listener)
    code = 1
    try:
        _detach_from_terminal(work.verbose)
        process.close_all_but({work.listener, work.keeper, *work.others})
        process.raise_descriptor_limit()
        graft = Installation(settings)
        dataplane.check_supervised(settings)
        containers = [one.id for one in graft.containers.listing()]
        enter_own_cgroup(settings, container.id, container.cgroup_path, containers)
        namespaces = NamespaceSwitch(settings.host_netns, lambda cookie: _namespace_path(graft, container, cookie))
        gc.freeze()  # the collector then skips what is loaded now when it runs during a call
        protocols = _born_protocols(container, work.datagrams)
        timer = call_times.take(settings, container.id)
        supervisor = _make_supervisor(graft, work, listener, namespaces, protocols, timer)
        serve(supervisor, listener, work.journal, work.keeper, timer)
        if has_ended(work.keeper):
            _continue_without_keeper(work, graft, supervisor, listener, timer)
        release_desk(graft.maps)
        code = 0
    except BaseException:
        if os.environ.get("GRAFT_DEBUG"):
            traceback.print_exc()
    finally:
        os._exit(code)


def _continue_without_keeper(
    work: Supervision, graft: Installation, supervisor: Supervisor, listener: Listener, timer: CallTimer | None
) -> None:
    """End the container, or serve it to its end and clean up."""
    if work.clean_up is None:
        end_container(graft, work.container)
        return
    never_ready = os.eventfd(0, os.EFD_CLOEXEC)
    serve(supervisor, listener, work.journal, never_ready, timer)
    work.clean_up(graft)


def end_container(graft: Installation, container: Container) -> None:
    """End every process of a container that Graft started, and remove its rules, record and cgroup.

    What other processes have of its sockets is closed.
    """
    path = container.cgroup_path
    if path.exists():
        cgroup.kill(path)
    with leftovers.closed_after(graft, container), graft.transaction(ended=container) as change:
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
    work: Supervision,
    listener: Listener,
    namespaces: NamespaceSwitch,
    protocols: Protocols,
    timer: CallTimer | None,
) -> Supervisor:
    """The supervisor of a container in the calling process, with a desk of its own."""
    container, verbose, killable = work.container, work.verbose, work.killable
    log = _call_logger(graft.endpoints) if verbose else None
    desk = open_desk(graft, container.id)
    is_born = container.transport is Transport.BORN
    netns = _own_namespace(namespaces, container) if protocols else ""  # else no socket(2) is trapped
    can_be_fast = not verbose and (killable or not is_born)  # a connect that is interrupted finds its socket replaced
    fast = open_fast_calls(listener.fd, container.transport, netns, desk) if can_be_fast else None
    if fast is not None and timer is not None:
        fast.count_times(timer.slot)
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
