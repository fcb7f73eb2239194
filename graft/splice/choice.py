"""Which listeners of a container are published, and which address is dialled for each. Pure.

The rules speak of what a program binds, so what it bound decides: the lookup is the one that the bind hook would have
made, had the program started under Graft. A listener on 127.0.0.1 is published by a rule that names 127.0.0.1 (or "*"),
not by one for 0.0.0.0: who binds the loopback address means not to be reached.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from graft.kernel.sockdiag import Listening

_ANY = bytes(16)
_LOOPBACK4 = "127.0.0.1"
_MAPPED = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Target:
    """Where to dial. ``source`` is the address to dial from, None to leave it to the kernel."""

    family: socket.AddressFamily
    address: str
    port: int
    source: str | None = None


@dataclass(frozen=True, slots=True)
class PlacedEndpoint:
    """An endpoint as it stands now: what a listener on it is told apart by."""

    id: int
    family: int
    address: bytes
    port: int
    netns: int
    dual_stack: bool = False


@dataclass(frozen=True, slots=True)
class Publication:
    """A listener to have on an endpoint. ``address`` and ``port`` are what the container bound."""

    endpoint: PlacedEndpoint
    family: int
    address: bytes
    port: int
    v6only: bool

    @property
    def takes_no_ipv4(self) -> bool:
        """Of the listener to have: it takes no more than the endpoint gives, nor than the container's own does."""
        return self.v6only or (self.endpoint.family == 6 and not self.endpoint.dual_stack)

    @property
    def target(self) -> Target:
        """Where its connections go."""
        return target(self.family, self.address, self.port, self.v6only)


def target(family: int, address: bytes, port: int, v6only: bool) -> Target:
    """Where to dial for a listener. From 127.0.0.1 also to the container's own addresses: a closed connection then
    blocks its port for a second at most (tcp_tw_reuse, which by default holds for loopback), not for a minute.
    """
    if family == 6 and address.startswith(_MAPPED):
        family, address = 4, address[12:] + bytes(12)
    if address == _ANY:
        if family == 6 and v6only:
            return Target(socket.AF_INET6, "::1", port)
        return Target(socket.AF_INET, _LOOPBACK4, port)
    if family == 4:
        text = socket.inet_ntop(socket.AF_INET, address[:4])
        return Target(socket.AF_INET, text, port, None if address[0] == 127 else _LOOPBACK4)
    text = socket.inet_ntop(socket.AF_INET6, address)
    return Target(socket.AF_INET6, text, port, None if text == "::1" else "::1")


def _preference(listener: Listening) -> tuple[int, int, int, bytes]:
    """Where several listeners are granted one endpoint: the widest, and then always the same one."""
    scope = 0 if listener.address == _ANY else 2 if listener.address[0] == 127 else 1
    return scope, listener.family, listener.port, listener.address


def publications(
    listeners: Iterable[Listening],
    cgroups: Collection[int],
    lookup: Callable[[int, bytes, int], PlacedEndpoint | None],
) -> list[Publication]:
    """What to publish of a namespace's ``listeners``: those of the container's own ``cgroups``.

    ``lookup`` gives the endpoint that a bind of (family, address, port) becomes. An endpoint with a port
    of its own serves one listener; one with a dynamic port serves each on a port of the kernel's choice.
    """
    wanted: dict[tuple[object, ...], Publication] = {}
    for listener in sorted(listeners, key=_preference):
        if listener.device or (listener.cgroup and listener.cgroup not in cgroups):
            continue
        family, address = listener.family, listener.address
        mapped = family == 6 and address.startswith(_MAPPED)
        endpoint = (
            lookup(4, address[12:] + bytes(12), listener.port) if mapped else lookup(family, address, listener.port)
        )
        if endpoint is None or (endpoint.family == 4 and family == 6 and listener.v6only):
            continue
        found = Publication(endpoint, family, address, listener.port, listener.v6only)
        key = (endpoint.id,) if endpoint.port else (endpoint.id, family, address, listener.port)
        wanted.setdefault(key, found)
    return list(wanted.values())
