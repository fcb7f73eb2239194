"""All relays of one installation, in one process and one event loop.

The records of the attached containers (run_dir/containers) say what to serve; a daemon that is started again needs
nothing else. The records are read a few times a second (container_list.py), and each container's listeners are scanned
in its own turns (container_service.py); `graft attach` and `graft detach` do not wait for that, they send a command.

Nothing here blocks: neither on the installation's lock, which any command may keep for long, nor on another process.
What has to block runs in a thread (background.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NoReturn

from graft.datapath import exchanges
from graft.keeper import protocol
from graft.model.settings import Settings
from graft.splice import daemon_process
from graft.splice.background import Background
from graft.splice.cgroups import Cgroups
from graft.splice.commands import Commands, Reply, failure
from graft.splice.container_list import ContainerList
from graft.splice.container_service import SCAN_SECONDS, ContainerService, Context
from graft.splice.event_loop import EventLoop
from graft.splice.keeper_watch import KeeperWatch
from graft.splice.kept import Kept
from graft.splice.kept_records import Kind
from graft.splice.kernel_relay import KernelRelay
from graft.splice.log import log, warn
from graft.splice.namespaces import Namespaces
from graft.splice.resources import DaemonResources
from graft.splice.sockmap import Sockmap
from graft.splice.unserved import Unserved
from graft.state.installation import Installation
from graft.state.records import Container

_IDLE_SECONDS = 3.0
_FLUSH_SECONDS = 2.0
_REAP_AGAIN_SECONDS = 10.0


class Service:
    """The daemon's work. ``keep``: run on when there is no container left to serve. ``keeper``: a socket that sends to
    it; ``received``: what it had of the graftd before (descriptor_store.py); ``keeper_pid``: its process id, if it is
    Graft's own.
    """

    def __init__(
        self,
        settings: Settings,
        keep: bool,
        keeper: socket.socket | None = None,
        received: Sequence[tuple[str, int]] = (),
        keeper_pid: int = 0,
    ) -> None:
        self._settings, self._keep = settings, keep
        self._loop = EventLoop(self._tick, SCAN_SECONDS)
        self._background = Background(self._loop)
        graft = Installation(settings)
        self._kept = Kept(self._loop, keeper, received)
        self._unserved = Unserved(self._kept, graft.maps)
        self.keeper_watch = KeeperWatch(settings, self._loop, self._kept, keeper_pid, keep)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        daemon_resources = DaemonResources(self._loop, limit, kept=self._kept)
        namespaces = Namespaces(settings, graft.endpoints)
        self._context = Context(settings, self._loop, graft.maps, namespaces, daemon_resources)
        self._kernel_relay = KernelRelay(settings, self._loop, self._background, self._on_relay_change)
        self._services: dict[int, ContainerService] = {}
        self._stopping: dict[int, ContainerService] = {}
        self._after_stop: list[Callable[[], None]] = []
        self._records = ContainerList(settings)
        self._cgroups = Cgroups(self._loop, self._loop.tick_soon)
        self._reaping = self._is_replaced = False
        self._empty_since = time.monotonic()
        self._started = time.time()
        self._commands = Commands(settings, self._loop, self._kept, self._handle)

    def last_turn(self) -> float:
        """When the event loop's own turn was last, in the time of time.monotonic()."""
        return self._loop.ticked

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or, without ``keep``, until there is no container left."""
        wakeup = self._handle_signals()
        try:
            self._erase_what_a_killed_one_left()
            self._tick()
            self._kept.store.say({protocol.READY: "1"})
            self._loop.run()
            if self._is_replaced:
                self._make_room()
        finally:
            for service in (*self._services.values(), *self._stopping.values()):
                with contextlib.suppress(OSError):
                    service.stop_now()
            self._commands.close()
            self._cgroups.close()
            self._context.namespaces.close()
            self._kernel_relay.close()
            self._context.daemon_resources.close()
            self.keeper_watch.close()
            self._kept.close()
            self._loop.shut_down()
            wakeup.close()

    def _erase_what_a_killed_one_left(self) -> None:
        maps = self._context.maps
        exchanges.erase_all(maps, self._kept.containers_with(Kind.INNER))
        records = self._records.current()
        for key in maps.relays.keys():  # noqa: SIM118
            if key.value not in records:
                maps.relays.delete(key)

    def _make_room(self) -> NoReturn:
        """End, and leave everything as it is to the graftd that the keeper starts next."""
        self._kernel_relay.close()
        if not self._kept.store.flush(_FLUSH_SECONDS):
            warn("the keeper does not take all that is to outlive this graftd")
        os._exit(protocol.REPLACED)

    def _replace(self, python: str, asker: int, reply: Reply) -> None:
        """Make room for the next one, where ``asker`` is a process when that has ended."""
        if not self._kept.store.is_kept:
            hint = "graft down, or end it and start it again: its connections are reset"
            reply({"error": "the daemon has no keeper, so nothing would outlive it", "hint": hint})
            return
        if python:
            self._kept.store.say(protocol.command(daemon_process.graftd_command(python, self._keep)))
        reply({"pid": os.getpid()})
        with contextlib.suppress(ProcessLookupError):
            if asker:
                self._loop.watch(os.pidfd_open(asker), select.EPOLLIN, lambda _mask: self._stop_for_the_next())
                return
        self._stop_for_the_next()

    def _stop_for_the_next(self) -> None:
        self._is_replaced = self._loop.stopping = True

    def _handle_signals(self) -> socket.socket:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        self._wakeup = writer  # stays open

        def wake_up(_mask: int) -> None:
            reader.recv(64)

        def stop(_signum: int, _frame: object) -> None:
            self._loop.stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        self._loop.watch(reader.fileno(), select.EPOLLIN, wake_up)
        return reader

    # ---- containers ----------------------------------------------------------------------------

    def _tick(self) -> None:
        """Start and stop services as the records say, and start the scans that are due."""
        records = self._records.current()
        self._stop_removed(records)
        self._unserved.close(records, {number for number, one in self._services.items() if one.serves})
        for container in records.values():
            if container.id in self._services:
                self._update(container)
            elif not self._cgroups.is_pending(container.id) and not self._cgroups.gone((container.id,)):
                self._start_serving(container)
        for service in self._services.values():
            service.scan_if_due()
        self._context.namespaces.tidy(self._context.maps)
        self._check_idle(bool(records))

    def _stop_removed(self, records: dict[int, Container]) -> None:
        """Stop services without a record, or whose cgroup is gone, though another may be at the same path."""
        for number in [number for number in self._services if number not in records]:
            self._stop_serving(number)
        self._cgroups.update(records)
        gone = self._cgroups.gone(records)
        for number in gone:
            self._stop_serving(number)
        if gone and not self._reaping:
            self._reaping = True
            self._background.run(partial(self._reap, gone), self._reaped)

    def _reap(self, gone: Collection[int]) -> None:
        """Remove the rules of containers that are gone. In a thread, with maps of its own: it waits for the lock."""
        with Installation(self._settings) as graft:
            graft.forget(gone)

    def _reaped(self, _result: None, error: Exception | None) -> None:
        if error is None:
            self._allow_reap()
            return
        warn(f"the rules of containers that are gone are still there: {error}")
        self._loop.after(_REAP_AGAIN_SECONDS, self._allow_reap)

    def _allow_reap(self) -> None:
        self._reaping = False

    def _start_serving(self, container: Container) -> bool:
        """Start a service. False while the service of an earlier cgroup at the same path is stopping, which may still
        have the same endpoints.
        """
        if any(container.cgroup == one.container.cgroup for one in self._stopping.values()):
            return False
        self._services[container.id] = ContainerService(self._context, container, self._sockmap_for(container))
        return True

    def _update(self, container: Container) -> None:
        """Use a record again, if it has changed."""
        service = self._services[container.id]
        if container != service.container:
            service.update(container, self._sockmap_for(container))

    def _on_relay_change(self) -> None:
        """The relay in the kernel can be used now, or can not any more."""
        for service in self._services.values():
            service.update(service.container, self._sockmap_for(service.container))

    def _sockmap_for(self, container: Container) -> Sockmap | None:
        """The relay in the kernel, if the container is to have it and it can be used; None for splice(2)."""
        if container.relay != "kernel":
            return None
        found = self._kernel_relay.sockmap()
        if self._kernel_relay.problem:
            problem = f"splice(2) serves, because the relay in the kernel fails here: {self._kernel_relay.problem}"
            warn(problem, container)
        return found

    def _stop_serving(self, number: int, done: Callable[[], None] = lambda: None) -> None:
        service = self._services.pop(number, None)
        if service is None:
            self._context.maps.relays.delete(ctypes.c_uint32(number))  # that of a graftd that was killed
            done()
            return
        self._stopping[number] = service

        def stopped() -> None:
            del self._stopping[number]
            waiting, self._after_stop = self._after_stop, []
            for call in (done, *waiting, self._loop.tick_soon):
                call()

        service.stop(stopped)

    def _check_idle(self, busy: bool) -> None:
        if busy or self._keep:
            self._empty_since = time.monotonic()
        elif time.monotonic() - self._empty_since > _IDLE_SECONDS:
            log("nothing left to serve")
            self._loop.stopping = True

    # ---- commands -------------------------------------------------------------------------------

    def _handle(self, request: dict[str, Any], reply: Reply) -> None:
        number = int(request["container"])
        match request["do"]:
            case "attach":
                self._attach(number, int(request["pid"]), reply)
            case "detach":
                self._stop_serving(number, lambda: self._kept.store.when_done(lambda: reply({})))
            case "describe":
                reply(self._describe(number))
            case "traffic":
                reply(self._traffic())
            case "stop":
                self._loop.stopping = True
                reply({"pid": os.getpid()})
            case "replace":
                self._replace(str(request["python"]), int(request["pid"]), reply)
            case "ping":
                self._empty_since = time.monotonic()
                served = sorted(number for number, one in self._services.items() if one.serves)
                own = {"pid": os.getpid(), "keeper": self.keeper_watch.pid, "python": sys.executable}
                own["maps"] = self._context.maps.number
                reply({**own, "containers": served})
            case other:
                reply({"error": f"the daemon does not know the command {other!r}"})

    def _attach(self, number: int, pid: int, reply: Reply) -> None:
        records = self._records.current()
        self._stop_removed(records)
        container = records.get(number)
        if container is not None and self._cgroups.is_pending(number):
            self._cgroups.when_known(number, lambda: self._attach(number, pid, reply))
            return
        if container is None or self._cgroups.gone((number,)):
            reply({"error": f"container {number} has no record, or its cgroup is gone"})
            return
        if number in self._services:
            self._update(container)
        elif not self._start_serving(container):
            self._after_stop.append(lambda: self._attach(number, pid, reply))
            return
        self._services[number].scan(
            pid, lambda error: reply(self._describe(number) if error is None else failure(error))
        )

    def _traffic(self) -> dict[str, Any]:
        counted = {str(number): one.traffic() for number, one in self._services.items() if one.serves}
        return {"pid": os.getpid(), "started": self._started, "containers": counted}

    def _describe(self, number: int) -> dict[str, Any]:
        service = self._services.get(number)
        return {"pid": os.getpid(), **(service.describe() if service else {"serves": False})}
