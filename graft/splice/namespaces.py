"""The namespaces that the relays work in, each opened once, found again by cookie."""

from __future__ import annotations

import contextlib
from pathlib import Path

from graft import store
from graft.containers import Container
from graft.errors import GraftError, NotFoundError
from graft.kernel import cgroup, netns
from graft.settings import Settings
from graft.splice.inside import Inside


class Namespaces:
    """Inside-views of the host's namespace, of endpoints' and of containers'."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open: dict[int, Inside] = {}
        host = netns.cookie(settings.host_netns)
        self._open[host] = Inside(settings.host_netns, host)
        self._host = host

    def of_endpoint(self, cookie: int) -> Inside:
        """The one that an endpoint belongs to. Raises NotFoundError."""
        found = self._open.get(cookie)
        if found is not None:
            return found
        for stored in store.listing(self._settings):
            if stored.cookie == cookie:
                inside = Inside(store.netns_path(self._settings, stored), cookie)
                self._open[cookie] = inside
                return inside
        raise NotFoundError("no endpoint has this network namespace any more")

    @staticmethod
    def of_container(container: Container, pid: int = 0) -> Inside:
        """A container's, by one of its processes. The caller closes it. Raises NotFoundError."""
        for candidate in [*([pid] if pid else []), *cgroup.processes(container.cgroup_path)]:
            with contextlib.suppress(GraftError):
                return Inside(Path(f"/proc/{candidate}/ns/net"), container.netns, at_home=True)
        raise NotFoundError(f"container: no process of {container.name!r} is left in its network namespace")

    def tidy(self, used: set[int]) -> None:
        """Let go of what no endpoint uses, and of sockets that nobody has asked for in a while."""
        for cookie, inside in list(self._open.items()):
            inside.trim()
            if cookie != self._host and cookie not in used:
                del self._open[cookie]
                inside.close()

    def close(self) -> None:
        """Let go of all."""
        for inside in self._open.values():
            inside.close()
        self._open.clear()
