"""The namespaces that the relays make sockets in, by cookie; each is opened once."""

from __future__ import annotations

import contextlib
import socket
from functools import partial
from pathlib import Path

from graft.datapath.maps import Maps
from graft.errors import GraftError, NotFoundError
from graft.kernel import cgroup, netns
from graft.model.settings import Settings
from graft.splice.jobs import Stepwise
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.questions import ask
from graft.state.endpoints import Endpoints
from graft.state.records import Container


def find_process(path: Path, cookie: int) -> int:
    """A process of a cgroup, or of one below it, that is in the network namespace of that cookie; 0 if none is."""
    for pid in cgroup.each_process(path):
        with contextlib.suppress(OSError):
            if netns.cookie(pid) == cookie:
                return pid
    return 0


class Namespaces:
    """Opens the namespaces of the host, of endpoints and of containers."""

    def __init__(self, settings: Settings, endpoints: Endpoints) -> None:
        self._settings, self._endpoints = settings, endpoints
        self._open: dict[int, NamespaceSockets] = {}
        host = netns.cookie(settings.host_netns)
        self._open[host] = NamespaceSockets(settings.host_netns, host)
        self._host = host

    def of_endpoint(self, cookie: int) -> NamespaceSockets:
        """The namespace of an endpoint. Raises NotFoundError."""
        found = self._open.get(cookie)
        if found is not None:
            return found
        for stored in self._endpoints.listing():
            if stored.cookie == cookie:
                opened = NamespaceSockets(self._endpoints.netns_path(stored), cookie)
                self._open[cookie] = opened
                return opened
        raise NotFoundError("no endpoint has this network namespace any more")

    def of_direct(self, container: Container) -> NamespaceSockets:
        """The host's namespace, for a container that shares it. The caller closes it. Raises NotFoundError."""
        return NamespaceSockets(self._settings.host_netns, container.netns, loopback_only=True)

    @staticmethod
    def of_container(
        container: Container, pid: int = 0, inside: socket.socket | None = None
    ) -> Stepwise[NamespaceSockets]:
        """The namespace of a container, by a socket that the graftd before made ``inside``, or by one of its processes
        (``pid`` is tried first). The caller closes it.

        Its processes can leave it, without any privilege, and their sockets stay: so a graftd that is started again
        does not ask them. Raises NotFoundError, KernelError.
        """
        with contextlib.suppress(GraftError, OSError):
            if inside is not None:
                return NamespaceSockets(inside, container.netns, loopback_only=True)
        with contextlib.suppress(GraftError):
            if pid:
                return NamespaceSockets(pid, container.netns, loopback_only=True)
        found = yield from ask(container.cgroup, partial(find_process, container.cgroup_path, container.netns))
        if not found:
            raise NotFoundError(f"container: no process of {container.name!r} is left in its network namespace")
        return NamespaceSockets(found, container.netns, loopback_only=True)

    def tidy(self, maps: Maps) -> None:
        """Close the namespaces that no endpoint uses."""
        if len(self._open) == 1:
            return
        used = {self._host, *(value.netns for _, value in maps.endpoints.items())}
        for cookie in [cookie for cookie in self._open if cookie not in used]:
            self._open.pop(cookie).close()

    def close(self) -> None:
        """Close all."""
        for opened in self._open.values():
            opened.close()
        self._open.clear()
