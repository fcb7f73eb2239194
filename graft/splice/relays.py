"""The relays of one container: its listeners are published, its outgoing connections relayed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import socket
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Any

from graft.datapath.layout import ENDPOINT_DUAL_STACK, ENDPOINT_UNIX
from graft.datapath.maps import Maps
from graft.datapath.rulesets import Lookup
from graft.errors import GraftError
from graft.kernel import netns
from graft.kernel.sockdiag import Diagnostics, ListeningSocket
from graft.model.address import SocketAddress
from graft.model.endpoint import Protocol
from graft.model.ports import mapped_port
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.splice import unix_endpoint
from graft.splice.acceptor import Acceptor
from graft.splice.connection import Connection
from graft.splice.datagram_clients import Server
from graft.splice.datagrams import DatagramRelay
from graft.splice.far_check import FarCheck
from graft.splice.inbound import InboundRelay, listen
from graft.splice.jobs import Stepwise
from graft.splice.kept import Found, digest
from graft.splice.kept_records import Kind, Record
from graft.splice.listeners import ContainerCgroups, collect_datagram_sockets, collect_listeners
from graft.splice.log import ContainerLog
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.outbound import OutboundRelay
from graft.splice.publication import Publication, PublicationPlan, ResolvedEndpoint
from graft.splice.resources import ContainerResources
from graft.splice.restored_connections import Judge, restore
from graft.splice.sockmap import Sockmap
from graft.splice.unix_endpoint import UnixInboundRelay
from graft.state import unix_sockets
from graft.state.records import Container

_STEP_ITEMS = 64  # quick ones, in one step
_STEP_RESETS = 16


Rule = tuple[int, int, bytes, int]
"""What a listener is for: its endpoint, and family, address and port that the container bound."""


class Relays:
    """Serves one container until `stop`. Longer work is done in steps, in the container's turns."""

    def __init__(
        self,
        settings: Settings,
        resources: ContainerResources,
        maps: Maps,
        container: Container,
        namespaces: Namespaces,
        container_netns: NamespaceSockets,
        sockmap: Sockmap | None,
        log: ContainerLog,
    ) -> None:
        """``container_netns`` is the container's namespace, closed with this object; ``sockmap`` is the relay in the
        kernel, None to relay by splice(2). Raises OSError.
        """
        self.container = container
        self._settings, self._resources, self._maps = settings, resources, maps
        self._namespaces, self._container_netns = namespaces, container_netns
        self._sockmap, self._log = sockmap, log
        self._published: dict[Publication, InboundRelay | UnixInboundRelay | Server] = {}
        self._errors: dict[Publication, str] = {}
        self._restored: dict[Rule, set[Connection]] = {}
        """Connections of the graftd before, by what their listener is for."""
        self._plan: PublicationPlan | None = None
        self._cgroups = ContainerCgroups(container.cgroup_path, container.cgroup_id, log)
        self._check_far = FarCheck(maps, container_netns)
        self._was_lost = False
        with contextlib.ExitStack() as undo:
            undo.callback(container_netns.close)
            self._lookup = Lookup(maps)
            self._diagnostics = container_netns.run(Diagnostics)
            undo.callback(self._diagnostics.close)
            self._datagrams = self._make_datagrams()
            undo.callback(self._stop_datagrams)
            self._outbound = self._make_outbound()
            undo.pop_all()

    def _make_datagrams(self) -> DatagramRelay | None:
        """Only transport splice: in the others a container's UDP sockets are the host's, or stay where they are."""
        if self.container.transport is not Transport.SPLICE:
            return None
        if not self._resources.daemon.client_places.has_room:
            self._log("no UDP: graftd relays that of as many containers as there is room for")
            return None
        return DatagramRelay(
            self._resources, self._maps, self._container_netns, self._namespaces, self.container.cgroup_id
        )

    def _stop_datagrams(self) -> None:
        """At once."""
        if self._datagrams is not None:
            for _ in self._datagrams.stop():
                pass

    def _make_outbound(self) -> OutboundRelay:
        return OutboundRelay(
            self._settings,
            self._resources,
            self._maps,
            self._container_netns,
            self._namespaces,
            self._sockmap,
            None if self._datagrams is None else self._datagrams.value(),
        )

    def _replace_lost(self) -> Stepwise[None]:
        """Make listeners again that somebody else closed."""
        if self._outbound.lost:
            if not self._was_lost:  # once: the container may do it again and again
                self._log("somebody closed its relay's listener; it is made again")
            self._was_lost = True
            self._outbound.stop()
            self._outbound = self._make_outbound()
        yield from self._withdraw(lambda key: self._published[key].is_lost)

    def set_sockmap(self, sockmap: Sockmap | None) -> None:
        """Relay new connections by ``sockmap`` from now on; None: by splice(2)."""
        self._sockmap = sockmap
        inbound = (one.acceptor for one in self._published.values() if isinstance(one, InboundRelay))
        for acceptor in (*self._outbound.acceptors, *inbound):
            acceptor.sockmap = sockmap

    @property
    def relay(self) -> str:
        """How new connections are relayed."""
        return "splice(2)" if self._sockmap is None else "kernel (sockmap)"

    def update(self) -> Stepwise[None]:
        """Publish what the container listens on now, and withdraw the rest. Raises OSError, NotFoundError."""
        yield from self._restore()
        yield from self._replace_lost()
        begun = time.monotonic()
        plan = yield from self._make_plan()
        yield from self._apply(plan, begun)
        yield from self._take_over_accepted()
        if (yield from self._cgroups.look_up(plan.elsewhere)):  # last: the container decides how long it takes
            begun = time.monotonic()
            yield from self._apply((yield from self._make_plan()), begun)

    def _restore(self) -> Stepwise[None]:
        """Continue with the connections of the graftd before."""
        judge = Judge(self._maps, self._lookup, self.container.id, self._container_netns.cookie)
        yield from restore(self._resources, judge, self._registry_of, self._sockmap, self._check_far)

    def _registry_of(self, record: Record) -> set[Connection]:
        """Where a connection is counted: with those of its listener, when that is published."""
        return self._restored.setdefault((record.endpoint, record.family, record.address, record.port), set())

    def _take_over_accepted(self) -> Stepwise[None]:
        """Relay what the graftd before has accepted, and no more, if its listener is there still."""
        kept = self._resources.daemon.kept
        for number, found in enumerate(kept.take(Kind.ACCEPTED, self.container.id), 1):
            try:
                acceptor = self._acceptor_of(found)
                is_taken = acceptor is not None and acceptor.take_over(found.socks[0], found.slot)
            except OSError:  # its client has gone
                is_taken = False
            if not is_taken:
                kept.close_found(found)
            if number % _STEP_RESETS == 0:
                yield

    def _acceptor_of(self, found: Found) -> Acceptor | None:
        """The one that would have accepted it now, by what the kernel says of it. Raises OSError."""
        near, number = found.socks[0], found.record.endpoint
        if not number:  # the relay of what goes out asks by itself where it leads to
            return self._outbound.acceptors[0] if netns.socket_cookie(near) == self._container_netns.cookie else None
        if near.family != socket.AF_UNIX:
            tag = self._maps.tags.get(ctypes.c_int32(near.fileno()))
            if tag is None or (tag.container, tag.endpoint) != (self.container.id, number):
                return None
        what = found.record.family, found.record.address, found.record.port
        for key, one in self._published.items():
            if key.endpoint.id == number and (key.family, key.address, key.port) == what:
                return None if isinstance(one, Server) else one.acceptor
        return None

    def _apply(self, plan: PublicationPlan, begun: float) -> Stepwise[None]:
        self._plan = plan
        if self._datagrams is not None:
            yield from self._datagrams.keep_programs(plan.datagram_ports, plan.datagram_peers, plan.unread_ports, begun)
        wanted = plan.publications
        endpoints = {key.endpoint.id for key in wanted}
        # If an endpoint has moved, its old listener stays until the new one listens.
        yield from self._withdraw(lambda key: key.endpoint.id not in endpoints)
        for number, publication in enumerate(wanted, 1):
            if publication not in self._published:
                self._publish(publication)
                yield
            elif number % _STEP_ITEMS == 0:
                yield
        yield from self._withdraw(lambda key: not plan.wants(key))
        self._errors = {key: error for key, error in self._errors.items() if plan.wants(key)}

    def _make_plan(self) -> Stepwise[PublicationPlan]:
        """What to publish by the policy in force. Made again if the policy was replaced meanwhile."""
        while True:
            before = self._ruleset()
            cgroups = self._check_far.cgroups = self._cgroups.own
            lookup = partial(self._endpoint, before)
            own = () if self._datagrams is None else self._datagrams.stand_in_ports
            plan = PublicationPlan(
                cgroups, lookup, self._resources.max_listeners, self._published.keys(), self._cgroups.others, own
            )
            try:
                yield from collect_listeners(
                    self._diagnostics, plan, self._resources.loop, {self._outbound.port}, *self._tag_reader()
                )
                if self._datagrams is not None:
                    yield from collect_datagram_sockets(self._diagnostics, plan, self._resources.loop)
            except OSError:
                self._diagnostics.close()
                self._diagnostics = self._container_netns.run(Diagnostics)
                raise
            if self._ruleset() == before:
                return plan

    def _tag_reader(self) -> tuple[int, Callable[[ListeningSocket], ListeningSocket]] | tuple[()]:
        """How to read the address that a program bound, where the listing shows another one: with transport direct."""
        if self.container.transport is not Transport.DIRECT:
            return ()
        return self._maps.tags.fd, partial(unix_endpoint.read_asked, container=self.container.id)

    def _ruleset(self) -> int:
        value = self._maps.containers.peek(ctypes.c_uint32(self.container.id))
        return 0 if value is None else int(value.ruleset)

    def _endpoint(self, ruleset: int, protocol: int, family: int, address: bytes, port: int) -> ResolvedEndpoint | None:
        number, first = self._lookup.ingress(ruleset, protocol, family, address, port) if ruleset else (0, 0)
        value = self._maps.endpoints.peek(ctypes.c_uint32(number)) if number else None
        wanted = Protocol.TCP if protocol == socket.IPPROTO_TCP else Protocol.UDP
        if value is None or not value.protocols & wanted:
            return None
        unix = unix_sockets.load(self._settings, number) if value.flags & ENDPOINT_UNIX else None
        if unix is None and (value.flags & ENDPOINT_UNIX or self.container.transport is not Transport.SPLICE):
            return None
        mapped = mapped_port(port, first, value.port, value.last_port)
        if mapped is None:
            return None
        dual_stack = bool(value.flags & ENDPOINT_DUAL_STACK)
        return ResolvedEndpoint(number, value.family, bytes(value.addr), mapped, value.netns, dual_stack, unix)

    def _publish(self, wanted: Publication) -> None:
        try:
            relay = self._start_unix(wanted) if wanted.endpoint.unix else self._start(wanted)
        except (OSError, GraftError) as error:
            self._note_error(wanted, error)
            return
        self._errors.pop(wanted, None)
        self._resources.descriptors.take()
        self._published[wanted] = relay
        if not isinstance(relay, Server):
            rule = wanted.endpoint.id, wanted.family, wanted.address, wanted.port
            relay.acceptor.connections = self._restored.pop(rule, relay.acceptor.connections)

    def _note_error(self, wanted: Publication, error: OSError | GraftError) -> None:
        problem = error.strerror or str(error) if isinstance(error, OSError) else error.message
        if self._errors.get(wanted) != problem and wanted.endpoint.unix:
            self._log(problem)
        self._errors[wanted] = problem

    def _start(self, wanted: Publication) -> InboundRelay | Server:
        sock, port, slot = self._kept_listener(wanted) or self._new_listener(wanted)
        if self._datagrams is not None and wanted.protocol == socket.IPPROTO_UDP:
            packed = wanted.endpoint.address[: 4 if wanted.endpoint.family == 4 else 16]
            return self._datagrams.serve(wanted, sock, str(SocketAddress(ip_address(packed), port)), slot)
        return InboundRelay(
            self._resources, self._maps, wanted, sock, port, self._container_netns, self._sockmap, self._check_far, slot
        )

    def _new_listener(self, wanted: Publication) -> tuple[socket.socket, int, int | None]:
        """A socket on the endpoint, its port, and its slot (kept.py)."""
        sock, port = self._listen(wanted, self._namespaces.of_endpoint(wanted.endpoint.netns))
        slot = self._resources.daemon.kept.add_listener(_kind(wanted), self.container.id, sock, port, digest(wanted))
        return sock, port, slot

    def _kept_listener(self, wanted: Publication) -> tuple[socket.socket, int, int | None] | None:
        """The same, of the graftd before: if it is for the same, and by its tag the container's at that endpoint."""
        what = digest(wanted)

        def is_it(found: Found) -> bool:
            sock = found.socks[0]
            tag = self._maps.tags.get(ctypes.c_int32(sock.fileno()))
            if tag is None or (tag.container, tag.endpoint) != (self.container.id, wanted.endpoint.id):
                return False
            if found.record.address != what or netns.socket_cookie(sock) != wanted.endpoint.netns:
                return False
            is_stream = wanted.protocol == socket.IPPROTO_TCP
            return not is_stream or bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

        kept = self._resources.daemon.kept
        taken = kept.take(_kind(wanted), self.container.id, is_it)
        for found in taken[1:]:
            kept.close_found(found)
        return (taken[0].socks[0], taken[0].record.port, taken[0].slot) if taken else None

    def _start_unix(self, wanted: Publication) -> UnixInboundRelay:
        # Another listener of this container may have the endpoint until now.
        for key in [key for key in self._published if key.endpoint.id == wanted.endpoint.id]:
            self._unpublish(key)
        close = self._resources.close_socket
        sock, _file = unix_endpoint.listen(self._settings, self._maps, self.container.id, wanted, close)
        try:
            return UnixInboundRelay(self._resources, self._maps, wanted, sock, self._container_netns, self._check_far)
        except BaseException:
            unix_endpoint.withdraw(self._settings, self.container.id, wanted.endpoint.id)
            raise

    def _listen(self, wanted: Publication, endpoint_netns: NamespaceSockets) -> tuple[socket.socket, int]:
        try:
            return listen(self._maps, self.container.id, wanted, endpoint_netns)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not wanted.endpoint.port:
                raise
        # Perhaps another listener of this container has it, for the endpoint's old address or for a closed listener.
        for key in [key for key in self._published if _port(key) == _port(wanted)]:
            self._unpublish(key)
        return listen(self._maps, self.container.id, wanted, endpoint_netns)

    def _unpublish(self, gone: Publication) -> None:
        if gone.endpoint.unix:
            unix_endpoint.withdraw(self._settings, self.container.id, gone.endpoint.id)
        self._published.pop(gone).close()
        self._resources.descriptors.give_back()

    def _withdraw(self, is_gone: Callable[[Publication], bool]) -> Stepwise[None]:
        for number, key in enumerate(list(self._published), 1):
            if is_gone(key) and key in self._published:
                self._unpublish(key)
                yield
            elif number % _STEP_ITEMS == 0:
                yield

    def stop(self) -> Stepwise[None]:
        """Close all listeners, and reset all connections."""
        self._outbound.stop()
        yield
        yield from self._withdraw(lambda _: True)
        while self._resources.connections:
            for connection in list(itertools.islice(self._resources.connections, _STEP_RESETS)):
                connection.reset()
            yield
        if self._datagrams is not None:
            yield from self._datagrams.stop()
        self._check_far.close()
        self._diagnostics.close()
        self._container_netns.close()

    def describe(self) -> dict[str, Any]:
        """For `graft ps` and `graft attach`: what is published, and what is not and why."""
        published = [
            {
                "endpoint": key.endpoint.id,
                "address": one.address,
                "listener": _text(key.family, key.address, key.port),
                "dials": f"{key.target.address}:{key.target.port}",
                **one.describe(),
            }
            for key, one in self._published.items()
        ]
        failed = [
            {"endpoint": key.endpoint.id, "listener": _text(key.family, key.address, key.port), "error": error}
            for key, error in self._errors.items()
        ]
        plan = self._plan
        return {
            "relay": self.relay,
            "published": published,
            "failed": failed,
            "not_granted": sorted(_text(*place) for place in plan.unpublished) if plan else [],
            "more_not_granted": plan.more_unpublished if plan else 0,
            "too_many": plan.too_many if plan else 0,
            "out": {"port": self._outbound.port, "served": sum(one.served for one in self._outbound.acceptors)},
            **({} if self._datagrams is None else {"datagrams": self._datagrams.describe()}),
            "connections": len(self._resources.connections),
            **({"problem": self._cgroups.problem} if self._cgroups.problem else {}),
        }


def _kind(wanted: Publication) -> Kind:
    return Kind.LISTENER if wanted.protocol == socket.IPPROTO_TCP else Kind.DATAGRAMS


def _port(key: Publication) -> tuple[int, int, int]:
    """What only one socket can be bound to."""
    return key.protocol, key.endpoint.id, key.endpoint.port


def _text(family: int, address: bytes, port: int) -> str:
    kind, size = (socket.AF_INET, 4) if family == 4 else (socket.AF_INET6, 16)
    text = socket.inet_ntop(kind, address[:size])
    return f"{text}:{port}" if family == 4 else f"[{text}]:{port}"
