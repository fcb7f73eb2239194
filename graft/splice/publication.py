"""Which listeners of a container are published, and which address is dialled for each. Pure.

The rules speak of what a program binds, so what it bound decides: the lookup is the one that the bind hook would have
made, had the program started under Graft. A listener on 127.0.0.1 is published by a rule that names 127.0.0.1 (or "*"),
not by one for 0.0.0.0: who binds the loopback address means not to be reached.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass

from graft.kernel.sockdiag import ListeningSocket
from graft.model.address import unmapped_bytes

MOST_OTHERS = 64
_ANY = bytes(16)
_LOOPBACK4 = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class DialTarget:
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
    def target(self) -> DialTarget:
        """Where its connections go."""
        return target(self.family, self.address, self.port, self.v6only)


def target(family: int, address: bytes, port: int, v6only: bool) -> DialTarget:
    """Where to dial for a listener. From 127.0.0.1 also to the container's own addresses: a closed connection then
    blocks its port for a second at most (tcp_tw_reuse, which by default holds for loopback), not for a minute.
    """
    if family == 6:
        family, address = unmapped_bytes(address)
    if address == _ANY:
        if family == 6 and v6only:
            return DialTarget(socket.AF_INET6, "::1", port)
        return DialTarget(socket.AF_INET, _LOOPBACK4, port)
    if family == 4:
        text = socket.inet_ntop(socket.AF_INET, address[:4])
        return DialTarget(socket.AF_INET, text, port, None if address[0] == 127 else _LOOPBACK4)
    text = socket.inet_ntop(socket.AF_INET6, address)
    return DialTarget(socket.AF_INET6, text, port, None if text == "::1" else "::1")


class Publications:
    """Which of a namespace's listeners to publish: those of the container's own ``cgroups``, told one after the other.

    ``lookup`` gives the endpoint that a bind of (family, address, port) becomes. An endpoint with a port of its own
    serves one listener; one with a dynamic port serves each on a port of the kernel's choice. ``most`` are published,
    and those that are (``published``) before any others.
    """

    def __init__(
        self,
        cgroups: Collection[int],
        lookup: Callable[[int, bytes, int], PlacedEndpoint | None],
        most: int,
        published: Collection[Publication] = (),
    ) -> None:
        self._cgroups, self._lookup = cgroups, lookup
        self._published = published
        self._new_ones = max(0, most - len(published))
        self._wanted: dict[tuple[object, ...], Publication] = {}
        self.others: dict[tuple[int, bytes, int], None] = {}
        """(family, address, port) of what is not published: the first `MOST_OTHERS` of them."""
        self.more_others = self.too_many = 0
        """How many others there are besides; how many of them were granted, but beyond ``most``."""

    def consider(self, listener: ListeningSocket) -> None:
        """Take note of one listener."""
        if listener.cgroup and listener.cgroup not in self._cgroups:
            return
        found = self._publication(listener)
        if found is None:
            self._note_other((listener.family, listener.address, listener.port))
            return
        before = self._wanted.get(_key(found))
        if before is None:
            self._add(found)
        elif before != found:
            kept, other = sorted((before, found), key=_preference)
            self._wanted[_key(found)] = kept
            self._note_other(_place(other))

    def _publication(self, listener: ListeningSocket) -> Publication | None:
        if listener.device:
            return None
        family, address = listener.family, listener.address
        asked = unmapped_bytes(address) if family == 6 else (family, address)
        endpoint = self._lookup(asked[0], asked[1], listener.port)
        if endpoint is None or (endpoint.family == 4 and family == 6 and listener.v6only):
            return None
        return Publication(endpoint, family, address, listener.port, listener.v6only)

    def _add(self, found: Publication) -> None:
        if found not in self._published:
            if not self._new_ones:
                self.too_many += 1
                self._note_other(_place(found))
                return
            self._new_ones -= 1
        self._wanted[_key(found)] = found

    def _note_other(self, place: tuple[int, bytes, int]) -> None:
        if len(self.others) < MOST_OTHERS:
            self.others[place] = None
        elif place not in self.others:
            self.more_others += 1

    @property
    def publications(self) -> list[Publication]:
        """What to publish of all that was told so far."""
        return list(self._wanted.values())

    def wants(self, published: Publication) -> bool:
        """Whether that is one of `publications`."""
        return self._wanted.get(_key(published)) == published


def _key(found: Publication) -> tuple[object, ...]:
    return (found.endpoint.id,) if found.endpoint.port else (found.endpoint.id, *_place(found))


def _place(found: Publication) -> tuple[int, bytes, int]:
    return found.family, found.address, found.port


def _preference(found: Publication) -> tuple[int, int, int, bytes, bool]:
    """Where several listeners are granted one endpoint: the widest, and then always the same one."""
    scope = 0 if found.address == _ANY else 2 if found.address[0] == 127 else 1
    return scope, found.family, found.port, found.address, found.v6only
