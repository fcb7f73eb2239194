"""The relays of one container: what it listens on published, what it connects to carried out."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
from functools import partial
from pathlib import Path
from typing import Any

from graft.containers import Container
from graft.endpoint import Protocol
from graft.errors import GraftError
from graft.kernel import cgroup
from graft.kernel.sockdiag import Diagnostics, Listening
from graft.layout import ENDPOINT_DUAL_STACK
from graft.maps import Maps
from graft.rules import Lookup
from graft.splice.choice import PlacedEndpoint, Publication, publications
from graft.splice.connection import Connection
from graft.splice.inside import Inside
from graft.splice.inward import Published, listen, true_port
from graft.splice.loop import Loop
from graft.splice.namespaces import Namespaces
from graft.splice.outward import Turned
from graft.splice.sockmap import Sockmap

_SHOWN = 256  # listeners of a kind, in a description


class Relays:
    """Serves one container until `stop`."""

    def __init__(
        self,
        loop: Loop,
        maps: Maps,
        container: Container,
        spaces: Namespaces,
        sockmap: Sockmap | None,
        pid: int = 0,
    ) -> None:
        """``sockmap`` is the relay in the kernel, None to have splice(2).

        Raises GraftError, OSError where the container's namespace cannot be entered.
        """
        self.container = container
        self._sockmap = sockmap
        self._loop, self._maps, self._spaces = loop, maps, spaces
        self._lookup = Lookup(maps)
        self._published: dict[Publication, Published] = {}
        self._retired: list[set[Connection]] = []
        self._errors: dict[Publication, str] = {}
        self._listening: list[Listening] = []
        self._own: set[int] = set()
        self._paused = False
        self._inside = spaces.of_container(container, pid)
        try:
            self._diagnostics = self._inside.do(Diagnostics)
            try:
                self._turned = Turned(loop, maps, container, self._inside, spaces, sockmap)
            except BaseException:
                self._diagnostics.close()
                raise
        except BaseException:
            self._inside.close()
            raise

    def use(self, sockmap: Sockmap | None) -> None:
        """Relay new connections that way from now on."""
        self._sockmap = self._turned.sockmap = sockmap
        for published in self._published.values():
            published.sockmap = sockmap

    @property
    def relay(self) -> str:
        """How new connections are relayed."""
        return "splice(2)" if self._sockmap is None else "kernel (sockmap)"

    def look(self) -> None:
        """See what the container listens on now, and publish that. Raises OSError."""
        wanted = self._wanted()
        for gone in [key for key in self._published if key not in wanted]:
            # An endpoint that moved within its port needs the old listener gone before the new one can be.
            if not any(key.endpoint.id == gone.endpoint.id for key in wanted):
                self._withdraw(gone)
        for publication in wanted:
            if publication not in self._published:
                self._publish(publication)
        for gone in [key for key in self._published if key not in wanted]:
            self._withdraw(gone)
        self._errors = {key: error for key, error in self._errors.items() if key in wanted}
        self._retired = [connections for connections in self._retired if connections]
        self._inside.trim()

    def _wanted(self) -> list[Publication]:
        """What the policy makes of the container's listeners. Asked again where the policy was replaced meanwhile."""
        self._own = _cgroup_ids(self.container.cgroup_path)
        self._listening = [found for found in self._diagnostics.listening() if self._is_own(found)]
        for _ in range(10):
            before = self._ruleset()
            found = publications(self._listening, self._own, partial(self._endpoint, before))
            if self._ruleset() == before:
                return found
        return list(self._published)

    def _is_own(self, found: Listening) -> bool:
        return found.port != self._turned.port and (not found.cgroup or found.cgroup in self._own)

    def _ruleset(self) -> int:
        value = self._maps.containers.peek(ctypes.c_uint32(self.container.id))
        return 0 if value is None else int(value.ruleset)

    def _endpoint(self, ruleset: int, family: int, address: bytes, port: int) -> PlacedEndpoint | None:
        number = self._lookup.ingress(ruleset, socket.IPPROTO_TCP, family, address, port) if ruleset else 0
        value = self._maps.endpoints.peek(ctypes.c_uint32(number)) if number else None
        if value is None or not value.protocols & Protocol.TCP:
            return None
        dual_stack = bool(value.flags & ENDPOINT_DUAL_STACK)
        return PlacedEndpoint(number, value.family, bytes(value.addr), value.port, value.netns, dual_stack)

    def _publish(self, wanted: Publication) -> None:
        try:
            where = self._spaces.of_endpoint(wanted.endpoint.netns)
            sock = self._listen(wanted, where)
            port = true_port(wanted, sock, where)
        except (OSError, GraftError) as error:
            self._errors[wanted] = error.strerror or str(error) if isinstance(error, OSError) else error.message
            return
        self._errors.pop(wanted, None)
        published = Published(
            self._loop, self._maps, self.container.id, wanted, sock, port, self._inside, self._sockmap
        )
        self._published[wanted] = published
        if self._paused:
            published.door.pause(True)

    def _listen(self, wanted: Publication, where: Inside) -> socket.socket:
        try:
            return listen(self._maps, self.container.id, wanted, where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        # Perhaps in use by our own, for an address that the endpoint had or a listener that is gone.
        for key in [key for key in self._published if key.endpoint.id == wanted.endpoint.id]:
            self._withdraw(key)
        return listen(self._maps, self.container.id, wanted, where)

    def _withdraw(self, gone: Publication) -> None:
        published = self._published.pop(gone)
        published.door.close()
        if published.connections:
            self._retired.append(published.connections)

    def connections(self) -> list[Connection]:
        """Every connection that is being relayed."""
        sets = [published.connections for published in self._published.values()]
        return [one for each in (*sets, *self._retired, self._turned.connections) for one in each]

    def pause(self, paused: bool) -> None:
        """Take no new connections for a while, or take them again: descriptors are scarce."""
        self._paused = paused
        for published in self._published.values():
            published.door.pause(paused)
        self._turned.door.pause(paused)

    def stop(self) -> None:
        """Withdraw everything, and reset what is connected."""
        for key in list(self._published):
            self._withdraw(key)
        self._turned.stop()
        for connection in self.connections():
            connection.reset()
        self._diagnostics.close()
        self._inside.close()

    def describe(self) -> dict[str, Any]:
        """For `graft ps` and `graft attach`: what is published, what is not and why."""
        published = [
            {
                "endpoint": key.endpoint.id,
                "address": one.address,
                "listener": _text(key.family, key.address, key.port),
                "dials": f"{key.target.address}:{key.target.port}",
                "connections": len(one.connections),
                "served": one.served,
            }
            for key, one in self._published.items()
        ]
        failed = [
            {"endpoint": key.endpoint.id, "listener": _text(key.family, key.address, key.port), "error": error}
            for key, error in self._errors.items()
        ]
        served = {(key.family, key.address, key.port) for key in (*self._published, *self._errors)}
        others = sorted(
            {
                _text(found.family, found.address, found.port)
                for found in self._listening
                if (found.family, found.address, found.port) not in served
            }
        )
        # How many there are is the container's doing, and an answer has to fit into one message.
        lists: dict[str, list[Any]] = {"published": published, "failed": failed, "not_granted": others}
        return {
            "relay": self.relay,
            **{name: found[:_SHOWN] for name, found in lists.items()},
            "left_out": sum(max(0, len(found) - _SHOWN) for found in lists.values()),
            "out": {"port": self._turned.port, "served": self._turned.served},
            "connections": len(self.connections()),
        }


def _text(family: int, address: bytes, port: int) -> str:
    kind, size = (socket.AF_INET, 4) if family == 4 else (socket.AF_INET6, 16)
    text = socket.inet_ntop(kind, address[:size])
    return f"{text}:{port}" if family == 4 else f"[{text}]:{port}"


def _cgroup_ids(path: Path) -> set[int]:
    """The ids of a cgroup and of all below it: sockets tell which one they were made in."""
    found = set()
    for folder in cgroup.tree(path):
        with contextlib.suppress(OSError):
            found.add(cgroup.cgroup_id(folder))
    return found
