"""A supervisor's side of its container's ferry: starts it, once for a container, and asks it to stand in for a port.

A container may have several supervisors (one for each process that an engine started in it) and has one ferry. Whoever
needs it first starts it, under a lock; it lives as long as its container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import traceback
import warnings
from collections.abc import Iterator

from graft.datapath.maps import Maps
from graft.kernel import process
from graft.model.settings import Settings
from graft.state import ferries
from graft.state.records import Container
from graft.swap.ferry import Ferry
from graft.swap.socket_pool import NamespaceSwitch, Owner

_MAX_OWNERS = 256


class FerryClient:
    """Of one supervisor."""

    def __init__(self, settings: Settings, maps: Maps, container: Container, namespaces: NamespaceSwitch) -> None:
        self._settings, self._maps, self._container, self._namespaces = settings, maps, container, namespaces
        self._connection: socket.socket | None = None
        self._owners: set[Owner] = set()
        self._poll = select.poll()

    def is_there_for(self, owner: Owner) -> bool:
        """Whether the container has a ferry, which knows that there are sockets of that user and group."""
        if not self._is_there():
            return False
        if owner not in self._owners:
            if len(self._owners) >= _MAX_OWNERS:
                self._owners.clear()
            self._owners.add(owner)
            self._ask(ferries.OWNER + struct.pack(ferries.OWNER_FORMAT, *owner))
        return self._connection is not None

    def _is_there(self) -> bool:
        """Whether the container has a ferry; one is started where there is none."""
        if self._connection is not None:
            if not self._poll.poll(0):
                return True
            self._drop()
        with contextlib.suppress(OSError):
            self._connection = ferries.connect(self._settings, self._container.id) or self._start()
        if self._connection is None:
            return False
        self._poll.register(self._connection, 0)  # hung up: it has ended
        for owner in self._owners:  # of sockets that another ferry stood in for
            self._ask(ferries.OWNER + struct.pack(ferries.OWNER_FORMAT, *owner))
        return self._connection is not None

    def stand_in(self, port: int, ipv4: bool, ipv6: bool) -> None:
        """Have what comes to ``port`` inside brought to the socket that has it on the host's stack.

        Without effect where another socket has that port inside.
        """
        if self._is_there():
            self._ask(ferries.STAND_IN + struct.pack(ferries.STAND_IN_FORMAT, port, ipv4, ipv6))

    def _ask(self, request: bytes) -> None:
        """One request, and wait until it is done."""
        if self._connection is None:
            return
        try:
            self._connection.send(request)
            self._connection.recv(1)
        except OSError:
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._poll.unregister(self._connection)
            self._connection.close()
            self._connection = None

    def _start(self) -> socket.socket | None:
        """Start a ferry, and wait until it can be used; None where it fails."""
        path = ferries.socket_path(self._settings, self._container.id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            found = ferries.connect(self._settings, self._container.id)
            if found is not None:
                return found
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(str(path))
                listener.listen()
                ready, started = os.pipe()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a second thread, which only waits (end_watcher.py)
                    pid = os.fork()
                if pid == 0:
                    self._run(listener, started)
                os.close(started)
                os.read(ready, 1)
                os.close(ready)
            os.waitpid(pid, 0)
            return ferries.connect(self._settings, self._container.id)

    def _run(self, listener: socket.socket, started: int) -> None:
        """The ferry's process: not this one's child, so that nobody has to wait for its end. Never returns."""
        code = 1
        try:
            if os.fork():
                os._exit(0)
            os.setsid()
            ferry = Ferry(self._settings, self._maps, self._container, self._namespaces, listener)
            process.close_all_but({*ferry.descriptors, started})
            os.write(started, b"+")
            os.close(started)
            ferry.run()
            code = 0
        except BaseException:
            if os.environ.get("GRAFT_DEBUG"):
                traceback.print_exc()
        finally:
            os._exit(code)


@contextlib.contextmanager
def _locked(path: os.PathLike[str]) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
