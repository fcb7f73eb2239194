"""Connections that another graftd began: continued where they were, if their container may have them still.

Whose a connection is, and by which rule it came, the kernel says of its sockets: near's tag, which it has from its
listener, or the destination that the connect hook noted with it. What the policy in force says of that rule is asked
anew. What is not granted any more is reset. So is what nobody can continue: bytes that were sent, and perhaps are to be
sent again; a pipe that was not kept.
"""

from __future__ import annotations

import ctypes
import errno
import socket
from collections.abc import Callable

from graft.datapath.layout import ENDPOINT_UNIX, Crossing
from graft.datapath.maps import Maps
from graft.datapath.rulesets import Lookup
from graft.kernel import netns
from graft.model.address import unmapped_bytes
from graft.model.endpoint import Protocol
from graft.model.transport import Home
from graft.policy.model import Verdict
from graft.splice.acceptor import OUT
from graft.splice.connection import Connection
from graft.splice.jobs import Stepwise
from graft.splice.kept import Found
from graft.splice.kept_records import CHECKED, COPYING, Kind, Record
from graft.splice.outside import OutsidePeer
from graft.splice.resources import ContainerResources
from graft.splice.sockmap import Sockmap

_STEP_CONNECTIONS = 16


class Judge:
    """Says whether the policy in force of one container grants a connection."""

    def __init__(self, maps: Maps, lookup: Lookup, container: int, container_netns: int) -> None:
        """``container_netns``: the cookie of its namespace."""
        self._maps, self._lookup, self._container, self._netns = maps, lookup, container, container_netns

    def grants(self, found: Found) -> bool:
        """Raises OSError where a socket is none any more."""
        near, far = found.socks
        value = self._maps.containers.peek(ctypes.c_uint32(self._container))
        if value is None:
            return False
        if found.record.kind is Kind.INBOUND:
            return self._grants_inbound(found, int(value.ruleset), near, far)
        return self._grants_outbound(int(value.ruleset), near, far)

    def _grants_inbound(self, found: Found, ruleset: int, near: socket.socket, far: socket.socket) -> bool:
        """The rule is that of the listener; far is a connection to the container's own."""
        record, is_unix = found.record, near.family == socket.AF_UNIX
        if netns.socket_cookie(far) != self._netns:
            return False
        if not is_unix:
            tag = self._maps.tags.get(ctypes.c_int32(near.fileno()))
            if tag is None or (tag.container, tag.endpoint, tag.home) != (self._container, record.endpoint, Home.HOST):
                return False
        family, address = unmapped_bytes(record.address) if record.family == 6 else (record.family, record.address)
        number, _ = self._lookup.ingress(ruleset, socket.IPPROTO_TCP, family, address, record.port)
        return number == record.endpoint and self._is_endpoint(number, is_unix)

    def _grants_outbound(self, ruleset: int, near: socket.socket, far: socket.socket) -> bool:
        """The rule is that of the destination, which the connect hook noted; far came to be by its endpoint."""
        asked = self._maps.crossings.get(ctypes.c_int32(near.fileno()))
        if asked is None or asked.role != Crossing.RELAYED or asked.container != self._container:
            return False
        if netns.socket_cookie(near) != self._netns:
            return False
        verdict, number = self._lookup.egress(ruleset, socket.IPPROTO_TCP, asked.family, bytes(asked.addr), asked.port)
        is_unix = far.family == socket.AF_UNIX
        if verdict != Verdict.GRANT or not self._is_endpoint(number, is_unix):
            return False
        if is_unix:
            return True
        tag = self._maps.tags.get(ctypes.c_int32(far.fileno()))
        return tag is not None and (tag.container, tag.endpoint) == (self._container, number)

    def _is_endpoint(self, number: int, is_unix: bool) -> bool:
        """Whether there is such an endpoint, which is a unix socket or is none."""
        value = self._maps.endpoints.peek(ctypes.c_uint32(number)) if number else None
        return (
            value is not None and bool(value.protocols & Protocol.TCP) and bool(value.flags & ENDPOINT_UNIX) == is_unix
        )


def restore(
    resources: ContainerResources,
    judge: Judge,
    registry_of: Callable[[Record], set[Connection]],
    sockmap: Sockmap | None,
    check_far: Callable[[socket.socket], bool],
) -> Stepwise[None]:
    """Continue with the connections of one container, and reset those that it may not have.

    ``registry_of`` gives where a connection is to be counted.
    """
    kept = resources.daemon.kept
    found_ones = [one for kind in (Kind.INBOUND, Kind.OUTBOUND) for one in kept.take(kind, resources.number)]
    for number, found in enumerate(found_ones, 1):
        if not _is_continued(resources, judge, found, registry_of(found.record), sockmap, check_far):
            kept.close_found(found)
        if number % _STEP_CONNECTIONS == 0:
            yield


def _is_continued(
    resources: ContainerResources,
    judge: Judge,
    found: Found,
    registry: set[Connection],
    sockmap: Sockmap | None,
    check_far: Callable[[socket.socket], bool],
) -> bool:
    try:
        if found.record.flags & COPYING or not judge.grants(found):
            return False
        address = _outside_address(found)
    except OSError:
        return False
    if not resources.reserve_connection():
        return False
    pipes = resources.daemon.kept.take_pipes(found)
    if pipes is None:
        resources.release_connection()
        return False
    near, far = found.socks
    is_out = found.record.kind is Kind.OUTBOUND
    connection = Connection(
        resources,
        registry,
        near,
        far,
        None if socket.AF_UNIX in (near.family, far.family) else sockmap,
        None if is_out or found.record.flags & CHECKED else check_far,
        OutsidePeer(resources, address),
        is_out,
        found.slot,
    )
    if not connection.closed:
        connection.resume(pipes)
    return True


def _outside_address(found: Found) -> str:
    """Of the peer that is not in the container, as graft/splice/acceptor.py has it; "" where it has none any more."""
    if found.record.kind is Kind.OUTBOUND:
        return OUT
    near = found.socks[0]
    try:
        return "" if near.family == socket.AF_UNIX else str(near.getpeername()[0])
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return ""  # both ends were sent, and what came is still to be read
