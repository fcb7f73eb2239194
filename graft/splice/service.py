"""All relays of one installation, in one process and one event loop.

What is to be served stands in the records of the attached containers (run_dir/containers): nothing is kept here that a
daemon which is started again would miss. ContainerList are looked at a few times a second, and so is each container, in
turns of its own (served.py); `graft attach` and `graft detach` do not wait for that, they ask.

Nothing here waits: not for the installation's lock, which any command may hold for long, nor for another process. What
has to be waited for is done aside.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from graft.model.settings import Settings
from graft.splice.background import Background
from graft.splice.commands import Commands, Reply, failure
from graft.splice.container_list import ContainerList
from graft.splice.container_service import LOOK_SECONDS, ContainerService, Context, say
from graft.splice.event_loop import EventLoop
from graft.splice.kernel_relay import KernelRelay
from graft.splice.namespaces import Namespaces
from graft.splice.resources import Resources
from graft.splice.sockmap import Sockmap
from graft.state.installation import Installation
from graft.state.records import Container

_IDLE_SECONDS = 3.0
_REAP_AGAIN_SECONDS = 10.0


class Service:
    """The daemon's work. ``keep``: go on also when there is no container left to serve."""

    def __init__(self, settings: Settings, keep: bool) -> None:
        self._settings, self._keep = settings, keep
        self._loop = EventLoop(self._look, LOOK_SECONDS)
        self._aside = Background(self._loop)
        graft = Installation(settings)
        room = Resources(self._loop, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._context = Context(self._loop, graft.maps, Namespaces(settings, graft.endpoints), room)
        self._kernel_relay = KernelRelay(settings, self._loop, self._aside, self._use_again)
        self._served: dict[int, ContainerService] = {}
        self._ending: dict[int, ContainerService] = {}
        self._after_ending: list[Callable[[], None]] = []
        self._records = ContainerList(settings)
        self._reaping = False
        self._empty_since = time.monotonic()
        self._commands = Commands(settings, self._loop, self._do)

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT, or, without ``keep``, until nothing is left to do."""
        wakeup = self._signals()
        try:
            self._look()
            ready()
            self._loop.run()
        finally:
            for served in (*self._served.values(), *self._ending.values()):
                with contextlib.suppress(OSError):
                    served.abandon()
            self._commands.close()
            self._context.spaces.close()
            self._kernel_relay.close()
            self._context.room.close()
            self._loop.shut_down()
            wakeup.close()

    def _signals(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        self._wakeup = theirs

        def stop(_signum: int, _frame: object) -> None:
            self._loop.stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        self._loop.watch(ours.fileno(), select.EPOLLIN, lambda _mask: [ours.recv(64)].clear())
        return ours

    # ---- what there is to serve -----------------------------------------------------------------

    def _look(self) -> None:
        """Bring what is served in line with the records, and let each container look at its listeners."""
        records = self._records.current()
        self._drop_gone(records)
        for container in records.values():
            if container.id in self._served:
                self._renew(container)
            elif container.exists:
                self._take(container)
        for served in self._served.values():
            served.look_if_due()
        self._context.spaces.tidy(self._context.maps)
        self._mind_idleness(bool(records))

    def _drop_gone(self, records: dict[int, Container]) -> None:
        """Serve no more what has no record, or whose cgroup is gone, though another may be at the same path."""
        for number in [number for number in self._served if number not in records]:
            self._drop(number)
        gone = [container for container in records.values() if not container.exists]
        for container in gone:
            self._drop(container.id)
        if gone and not self._reaping:
            self._reaping = True
            self._aside.run(self._reap, self._reaped)

    def _reap(self) -> None:
        """Have the rules of what is gone forgotten. In a thread: with maps of its own, and time for the lock."""
        with Installation(self._settings) as graft:
            graft.reap()

    def _reaped(self, _result: None, error: Exception | None) -> None:
        if error is None:
            self._may_reap()
            return
        say(f"the rules of containers that are gone are still there: {error}")
        self._loop.after(_REAP_AGAIN_SECONDS, self._may_reap)

    def _may_reap(self) -> None:
        self._reaping = False

    def _take(self, container: Container) -> bool:
        """Begin to serve. False where what was served at its cgroup's path before, and may have its endpoints, has not
        ended yet.
        """
        if any(container.cgroup == one.container.cgroup for one in self._ending.values()):
            return False
        self._served[container.id] = ContainerService(self._context, container, self._sockmap_for(container))
        return True

    def _renew(self, container: Container) -> None:
        """Take note of what has changed in a record."""
        served = self._served[container.id]
        if container != served.container:
            served.use(container, self._sockmap_for(container))

    def _use_again(self) -> None:
        """The relay in the kernel can serve now, or cannot any more."""
        for served in self._served.values():
            served.use(served.container, self._sockmap_for(served.container))

    def _sockmap_for(self, container: Container) -> Sockmap | None:
        """The relay in the kernel, for a container that is to have it. Where it cannot be had, splice(2) serves."""
        if container.relay != "kernel":
            return None
        found = self._kernel_relay.sockmap()
        if self._kernel_relay.problem:
            say(
                f"{container.name}: splice(2) serves, because the relay in the kernel fails here: "
                f"{self._kernel_relay.problem}"
            )
        return found

    def _drop(self, number: int, done: Callable[[], None] = lambda: None) -> None:
        served = self._served.pop(number, None)
        if served is None:
            done()
            return
        self._ending[number] = served

        def ended() -> None:
            del self._ending[number]
            waiting, self._after_ending = self._after_ending, []
            for call in (done, *waiting, self._loop.look_soon):
                call()

        served.end(ended)

    def _mind_idleness(self, busy: bool) -> None:
        if busy or self._keep:
            self._empty_since = time.monotonic()
        elif time.monotonic() - self._empty_since > _IDLE_SECONDS:
            say("nothing left to serve")
            self._loop.stopping = True

    # ---- commands -------------------------------------------------------------------------------

    def _do(self, request: dict[str, Any], answer: Reply) -> None:
        number = int(request["container"])
        match request["do"]:
            case "attach":
                self._attach(number, int(request["pid"]), answer)
            case "detach":
                self._drop(number, lambda: answer({}))
            case "describe":
                answer(self._describe(number))
            case "look":
                self._loop.look_soon()
                answer({})
            case "stop":
                self._loop.stopping = True
                answer({"pid": os.getpid()})
            case "ping":
                self._empty_since = time.monotonic()
                served = sorted(number for number, one in self._served.items() if one.serves)
                answer({"pid": os.getpid(), "containers": served})
            case other:
                answer({"error": f"the daemon knows no command {other!r}"})

    def _attach(self, number: int, pid: int, answer: Reply) -> None:
        records = self._records.current()
        self._drop_gone(records)
        container = records.get(number)
        if container is None or not container.exists:
            answer({"error": f"container {number} has no record, or its cgroup is gone"})
            return
        if number in self._served:
            self._renew(container)
        elif not self._take(container):
            self._after_ending.append(lambda: self._attach(number, pid, answer))
            return
        self._served[number].look(
            pid, lambda error: answer(self._describe(number) if error is None else failure(error))
        )

    def _describe(self, number: int) -> dict[str, Any]:
        served = self._served.get(number)
        return {"pid": os.getpid(), **(served.describe() if served else {"serves": False})}
