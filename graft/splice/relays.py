"""The relays of one container: what it listens on published, what it connects to carried out."""

from __future__ import annotations

import ctypes
import errno
import itertools
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from graft.datapath.layout import ENDPOINT_DUAL_STACK
from graft.datapath.maps import Maps
from graft.datapath.rulesets import Lookup
from graft.errors import GraftError
from graft.kernel.sockdiag import Diagnostics
from graft.model.endpoint import Protocol
from graft.splice.inbound import InboundRelay, listen
from graft.splice.jobs import Steps
from graft.splice.listeners import cgroup_ids, survey
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.outbound import OutboundRelay
from graft.splice.publication import PlacedEndpoint, Publication, Publications
from graft.splice.resources import Account
from graft.splice.sockmap import Sockmap
from graft.state.records import Container

_AT_ONCE = 64  # of what is quick, before others have their turn
_RESETS = 16


class Relays:
    """Serves one container until `stop`. What may take long is done in steps, in the container's turns."""

    def __init__(
        self,
        account: Account,
        maps: Maps,
        container: Container,
        spaces: Namespaces,
        inside: NamespaceSockets,
        sockmap: Sockmap | None,
    ) -> None:
        """``inside`` is the container's namespace, closed with this object; ``sockmap`` the relay in the kernel, None
        to have splice(2). Raises OSError.
        """
        self.container = container
        self._account, self._maps, self._spaces, self._inside = account, maps, spaces, inside
        self._sockmap = sockmap
        self._lookup = Lookup(maps)
        self._published: dict[Publication, InboundRelay] = {}
        self._errors: dict[Publication, str] = {}
        self._choice: Publications | None = None
        try:
            self._diagnostics = inside.do(Diagnostics)
            try:
                self._turned = OutboundRelay(account, maps, inside, spaces, sockmap)
            except BaseException:
                self._diagnostics.close()
                raise
        except BaseException:
            inside.close()
            raise

    def use(self, sockmap: Sockmap | None) -> None:
        """Relay new connections that way from now on."""
        self._sockmap = sockmap
        for acceptor in (*self._turned.acceptors, *(published.acceptor for published in self._published.values())):
            acceptor.sockmap = sockmap

    @property
    def relay(self) -> str:
        """How new connections are relayed."""
        return "splice(2)" if self._sockmap is None else "kernel (sockmap)"

    def look(self) -> Steps[None]:
        """See what the container listens on now, and publish that. Raises OSError, NotFoundError."""
        choice = self._choice = yield from self._survey()
        wanted = choice.publications
        endpoints = {key.endpoint.id for key in wanted}
        # One of an endpoint that moved stays until the new one listens.
        yield from self._withdraw(lambda key: key.endpoint.id not in endpoints)
        for number, publication in enumerate(wanted, 1):
            if publication not in self._published:
                self._publish(publication)
                yield
            elif number % _AT_ONCE == 0:
                yield
        yield from self._withdraw(lambda key: not choice.wants(key))
        self._errors = {key: error for key, error in self._errors.items() if choice.wants(key)}

    def _survey(self) -> Steps[Publications]:
        """What the policy makes of the container's listeners. Asked again where the policy was replaced meanwhile."""
        while True:
            before = self._ruleset()
            own = yield from cgroup_ids(self.container.cgroup_path, self.container.cgroup_id)
            lookup = partial(self._endpoint, before)
            choice = Publications(own, lookup, self._account.most_listeners, self._published.keys())
            try:
                yield from survey(self._diagnostics, choice, {self._turned.port})
            except OSError:
                self._diagnostics.close()
                self._diagnostics = self._inside.do(Diagnostics)
                raise
            if self._ruleset() == before:
                return choice

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
            sock, port = self._listen(wanted, where)
        except (OSError, GraftError) as error:
            self._errors[wanted] = error.strerror or str(error) if isinstance(error, OSError) else error.message
            return
        self._errors.pop(wanted, None)
        self._account.descriptors.take()
        self._published[wanted] = InboundRelay(
            self._account, self._maps, wanted, sock, port, self._inside, self._sockmap
        )

    def _listen(self, wanted: Publication, where: NamespaceSockets) -> tuple[socket.socket, int]:
        try:
            return listen(self._maps, self.container.id, wanted, where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not wanted.endpoint.port:
                raise
        # Perhaps in use by our own, for an address that the endpoint had or a listener that is gone.
        for key in [key for key in self._published if key.endpoint.id == wanted.endpoint.id]:
            self._take_back(key)
        return listen(self._maps, self.container.id, wanted, where)

    def _take_back(self, gone: Publication) -> None:
        self._published.pop(gone).acceptor.close()
        self._account.descriptors.give()

    def _withdraw(self, is_gone: Callable[[Publication], bool]) -> Steps[None]:
        for number, key in enumerate(list(self._published), 1):
            if is_gone(key) and key in self._published:
                self._take_back(key)
                yield
            elif number % _AT_ONCE == 0:
                yield

    def stop(self) -> Steps[None]:
        """Withdraw everything, and reset what is connected."""
        self._turned.stop()
        yield
        yield from self._withdraw(lambda _: True)
        while self._account.connections:
            for connection in list(itertools.islice(self._account.connections, _RESETS)):
                connection.reset()
            yield
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
                "connections": len(one.acceptor.connections),
                "served": one.acceptor.served,
            }
            for key, one in self._published.items()
        ]
        failed = [
            {"endpoint": key.endpoint.id, "listener": _text(key.family, key.address, key.port), "error": error}
            for key, error in self._errors.items()
        ]
        choice = self._choice
        return {
            "relay": self.relay,
            "published": published,
            "failed": failed,
            "not_granted": sorted(_text(*place) for place in choice.others) if choice else [],
            "more_not_granted": choice.more_others if choice else 0,
            "too_many": choice.too_many if choice else 0,
            "out": {"port": self._turned.port, "served": sum(acceptor.served for acceptor in self._turned.acceptors)},
            "connections": len(self._account.connections),
        }


def _text(family: int, address: bytes, port: int) -> str:
    kind, size = (socket.AF_INET, 4) if family == 4 else (socket.AF_INET6, 16)
    text = socket.inet_ntop(kind, address[:size])
    return f"{text}:{port}" if family == 4 else f"[{text}]:{port}"
