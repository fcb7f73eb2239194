"""Clients of the containers, each a thread in the client's namespace; and servers for the containers' own clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from tests.soak.containers import ALLOWED_PORT, FORBIDDEN, Box
from tests.soak.excuses import Failure
from tests.soak.services import SECONDS
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4

_NAP = 0.1


class Client:
    """Asks a container again and again, by new connections and by one that stays, until `stop`."""

    def __init__(self, box: Box) -> None:
        self.box, self.requests, self.failures = box, 0, list[Failure]()
        self._ending, self._paused, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._kept: tuple[socket.socket, int] | None = None
        self._answered = 0.0
        """When the connection that stays was last in order."""
        self._thread = threading.Thread(target=self._run, name=f"client of {box.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self.box.host.client.inside():
            while not self._ending.is_set():
                if self._paused.is_set() or not self.box.runs:
                    self._drop()
                    self._idle.set()
                    time.sleep(_NAP)
                    continue
                self._idle.clear()
                self._ask(self._ask_new, time.monotonic())
                if self.box.service.keeps_connections:
                    self._ask(self._ask_again, self._answered if self._kept else time.monotonic())
                self._ending.wait(_NAP)
            self._drop()

    def _ask(self, how: Callable[[], None], begun: float) -> None:
        """``begun``: since when it can have failed."""
        try:
            how()
        except (OSError, ValueError) as error:
            self._drop()
            what = f"{how.__name__[1:]}: {type(error).__name__}: {error}"
            self.failures.append(Failure(self.box.name, begun, time.monotonic(), what))
            self._ending.wait(_NAP)
        self.requests += 1

    def _ask_new(self) -> None:
        self.box.service.ask(HOST4, self.box.port, self.box.said)

    def _ask_again(self) -> None:
        port = self.box.port
        if self._kept is None or self._kept[1] != port:
            self._drop()
            self._kept = socket.create_connection((HOST4, port), SECONDS), port
        self.box.service.ask_again(self._kept[0], self.box.said)
        self._answered = time.monotonic()

    def _drop(self) -> None:
        if self._kept is not None:
            self._kept[0].close()
            self._kept = None

    def pause(self, paused: bool = True) -> None:
        """Ask no more, and wait until it does not; or ask again."""
        if paused:
            self._idle.clear()
            self._paused.set()
            self._idle.wait(3 * SECONDS)
        else:
            self._paused.clear()

    def stop(self) -> None:
        """End it."""
        self._ending.set()
        self._thread.join(3 * SECONDS)


class Servers:
    """One that answers the containers' clients, and some that nobody may reach, whose connections are counted."""

    def __init__(self, host: Host) -> None:
        self.reached: list[str] = []
        self._listeners = [host.client.listener(CLIENT4, ALLOWED_PORT)]
        for address, port in FORBIDDEN:
            self._listeners.append((host.client if address == CLIENT4 else host.netns).listener(address, port))
        for listener in self._listeners:
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        is_allowed = listener is self._listeners[0]
        while True:
            try:
                sock, peer = listener.accept()
            except OSError:  # closed
                return
            if not is_allowed:
                self.reached.append(f"{peer} reached what nobody may")
            sock.settimeout(SECONDS)
            with sock, contextlib.suppress(OSError):
                sock.sendall(sock.recv(1))

    def close(self) -> None:
        """Serve no more."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@contextlib.contextmanager
def serving(host: Host) -> Iterator[Servers]:
    """For the time of the block."""
    servers = Servers(host)
    try:
        yield servers
    finally:
        servers.close()
