"""All relays of one installation, in one process and one event loop.

What is to be served stands in the records of the attached containers (run_dir/containers): nothing is kept here that a
daemon which is started again would miss. Records and endpoints are looked at a few times a second; `graft attach` and
`graft detach` do not wait for that, they ask.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from graft import containers
from graft.containers import Container
from graft.errors import GraftError
from graft.lifecycle import locked
from graft.maps import Maps
from graft.printable import printable
from graft.settings import Settings
from graft.splice import control, selftest
from graft.splice.loop import Loop
from graft.splice.namespaces import Namespaces
from graft.splice.pipes import Pipes
from graft.splice.relays import Relays
from graft.splice.sockmap import Sockmap

_RESERVED = 512  # descriptors for all that is no connection
_IDLE_SECONDS = 3.0


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)


class Service:
    """The daemon's work. ``keep``: go on also when there is no container left to serve."""

    def __init__(self, settings: Settings, keep: bool) -> None:
        self._settings, self._keep = settings, keep
        self._maps = Maps(settings.pin_dir)
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # A connection has two descriptors; of what is left, pipes get a share, and where they run out bytes
        # are copied instead.
        pipes = max(8, min(1024, descriptors // 16))
        most = max(16, (descriptors - _RESERVED - 2 * pipes) // 2)
        self._loop = Loop(Pipes(pipes), self._look, most=most)
        self._spaces = Namespaces(settings)
        self._sockmap: Sockmap | None = None
        self._relays: dict[int, Relays] = {}
        self._failed: dict[int, str] = {}
        self._empty_since = time.monotonic()
        self._listener = control.listener(settings)
        self._loop.watch(self._listener.fileno(), select.EPOLLIN, self._on_command)

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT, or, without ``keep``, until nothing is left to do."""
        wakeup = self._signals()
        try:
            self._look()
            ready()
            self._loop.run()
        finally:
            for relays in self._relays.values():
                with contextlib.suppress(OSError):
                    relays.stop()
            (self._settings.run_dir / control.NAME).unlink(missing_ok=True)
            self._listener.close()
            self._spaces.close()
            if self._sockmap is not None:
                self._sockmap.close()
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
        records = {one.id: one for one in containers.listing(self._settings) if one.transport == "splice"}
        for number in [number for number in self._relays if number not in records]:
            self._drop(number)
        gone = False
        for container in records.values():
            if not container.cgroup_path.exists():
                self._drop(container.id)
                gone = True
            elif container.id not in self._relays:
                with contextlib.suppress(GraftError, OSError):
                    self._take(container, 0)
            else:
                self._renew(container)
        if gone:
            with contextlib.suppress(GraftError), locked(self._settings):
                containers.reap_locked(self._settings, self._maps)
        for relays in self._relays.values():
            try:
                relays.look()
            except OSError as error:  # what is published stays; the next look may do better
                _say(f"{relays.container.name}: {error}")
        self._spaces.tidy({value.netns for _, value in self._maps.endpoints.items()})
        for relays in self._relays.values():
            relays.pause(self._loop.full)  # new connections wait in the kernel until others end
        self._mind_idleness(bool(records))

    def _take(self, container: Container, pid: int) -> Relays:
        try:
            sockmap = self._sockmap_for(container)
            relays = Relays(self._loop, self._maps, container, self._spaces, sockmap, pid)
        except (GraftError, OSError) as error:
            if self._failed.get(container.id) != str(error):
                self._failed[container.id] = str(error)
                _say(f"{container.name}: {error}")
            raise
        self._failed.pop(container.id, None)
        self._relays[container.id] = relays
        _say(f"{container.name}: served, container {container.id}")
        return relays

    def _renew(self, container: Container) -> None:
        """Take note of what has changed in a record."""
        relays = self._relays[container.id]
        if container != relays.container:
            relays.use(self._sockmap_for(container))
            relays.container = container

    def _sockmap_for(self, container: Container) -> Sockmap | None:
        """The relay in the kernel, for a container that is to have it. Where it cannot be had, splice(2) serves."""
        if container.relay != "kernel":
            return None
        if self._sockmap is None:
            problem = selftest.verdict(self._settings)
            if problem:
                _say(f"{container.name}: splice(2) serves, because the relay in the kernel fails here: {problem}")
                return None
            self._sockmap = Sockmap.pinned(self._settings.pin_dir)
            self._loop.watch(self._sockmap.events, select.EPOLLIN, self._sockmap.on_events)
        return self._sockmap

    def _drop(self, number: int) -> None:
        relays = self._relays.pop(number, None)
        self._failed.pop(number, None)
        if relays is not None:
            relays.stop()
            _say(f"{relays.container.name}: no longer served")

    def _mind_idleness(self, busy: bool) -> None:
        if busy or self._keep:
            self._empty_since = time.monotonic()
        elif time.monotonic() - self._empty_since > _IDLE_SECONDS:
            _say("nothing left to serve")
            self._loop.stopping = True

    # ---- commands -------------------------------------------------------------------------------

    def _on_command(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            self._loop.watch(sock.fileno(), select.EPOLLIN, lambda _mask: self._answer(sock))

    def _answer(self, sock: socket.socket) -> None:
        try:
            raw = sock.recv(control.MAX_BYTES)
            if raw:
                sock.send(json.dumps(self._do(control.parse_request(raw))).encode())
        except (OSError, ValueError, GraftError) as error:
            _say(f"a command failed: {error}")
        finally:
            self._loop.close(sock)

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        number = int(request["container"])
        try:
            match request["do"]:
                case "attach":
                    return self._attach(number, int(request["pid"]))
                case "detach":
                    self._drop(number)
                    return {}
                case "describe":
                    return self._describe(number)
                case "look":
                    self._loop.look_soon()
                    return {}
                case "stop":
                    self._loop.stopping = True
                    return {"pid": os.getpid()}
                case "ping":
                    self._empty_since = time.monotonic()
                    return {"pid": os.getpid(), "containers": sorted(self._relays)}
        except GraftError as error:
            return {"error": error.message, "hint": error.hint}
        except OSError as error:
            return {"error": str(error)}
        return {"error": f"the daemon knows no command {request['do']!r}"}

    def _attach(self, number: int, pid: int) -> dict[str, Any]:
        container = next((one for one in containers.listing(self._settings) if one.id == number), None)
        if container is None:
            return {"error": f"container {number} has no record"}
        if number in self._relays:
            self._renew(container)
        else:
            self._take(container, pid)
        self._relays[number].look()
        return self._describe(number)

    def _describe(self, number: int) -> dict[str, Any]:
        about: dict[str, Any] = {"pid": os.getpid(), "serves": number in self._relays}
        if number in self._relays:
            about |= self._relays[number].describe()
        elif number in self._failed:
            about["problem"] = self._failed[number]
        return about
