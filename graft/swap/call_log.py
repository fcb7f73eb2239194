"""What `graft run -v` prints: a line for each trapped call."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from graft.model.endpoint import Endpoint
from graft.swap.birth import BirthEntry
from graft.swap.decision import Action, Call
from graft.swap.supervisor import LogEntry

_FAMILIES = {2: "inet", 10: "inet6"}
_TYPES = {1: "stream", 2: "dgram"}
_TYPE_MASK = 0xF  # SOCK_TYPE_MASK, include/linux/net.h


def format_entry(entry: LogEntry | BirthEntry, endpoints: Mapping[int, Endpoint]) -> str:
    """``graft: bind 0.0.0.0:80 -> nx4 (0.0.0.0:8080)`` and the like."""
    return _format_birth(entry) if isinstance(entry, BirthEntry) else _format_call(entry, endpoints)


def _format_birth(entry: BirthEntry) -> str:
    """``graft: socket inet stream: on the host's stack``"""
    kind = entry.type & _TYPE_MASK
    names = f"{_FAMILIES.get(entry.family, entry.family)} {_TYPES.get(kind, kind)}"
    protocol = f" {entry.protocol}" if entry.protocol else ""
    where = "unchanged" if entry.at_home else "on the host's stack"
    return f"graft: socket {names}{protocol}: {where}"


def _format_call(entry: LogEntry, endpoints: Mapping[int, Endpoint]) -> str:
    if entry.text:
        return f"graft: {entry.text}"
    head = f"graft: {entry.call.name.lower()}" + (f" {entry.address}" if entry.address is not None else "")
    decision = entry.decision
    if decision.action is Action.REFUSE or entry.error:
        return f"{head}: {errno.errorcode.get(entry.error or decision.error, '?')}"
    if decision.action is Action.TO_HOST:
        endpoint = endpoints.get(decision.endpoint)
        if endpoint is None:
            name = f"endpoint {decision.endpoint}"
        else:
            name = f"{endpoint.name} = {endpoint.spec_at(entry.port) if entry.port else endpoint.spec}"
        return f"{head} -> {name}" if entry.call is Call.BIND else f"{head} from {name}"
    if decision.action is Action.TO_BOTH:
        return f"{head}: port {entry.port} of the host, and of the container"
    if decision.action is Action.IPV6_ONLY:
        return f"{head}: unchanged, but IPv6 only"
    if decision.action is Action.TO_CONTAINER:
        return f"{head}: back to the container"
    return f"{head}: unchanged"
