"""How many sockets containers have on the host's stack, for `graft metrics` and `graft top`, which ask again and again.

One listing of the kernel's (sock_diag, which takes no socket's lock), in children with a time limit, which count there:
a container may have very many sockets. No process is searched, unlike in graft/state/inventory.py: a TCP socket belongs
to the container that its tag names, any other to the one in whose cgroups, or in whose supervisor's, it was made. What
a container was handed from elsewhere is not counted.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from graft.datapath import layout
from graft.datapath.dataplane import own_cgroup
from graft.datapath.maps import Maps
from graft.kernel import cgroup
from graft.kernel.sockets import ListedSocket, Listing
from graft.model.settings import Settings
from graft.model.transport import Home, Transport
from graft.state import members, stack_listing
from graft.state.inventory import HostStack
from graft.state.members import Members
from graft.state.records import Container
from graft.state.stack_listing import NO_DOUBTS, Doubts

_COUNT_SECONDS = 1.0
"""For the sockets of one listing; what is left then is not counted, and that is said."""
_AT_A_TIME = 256

SocketKind = tuple[str, str]
"""Protocol and state, as graft.kernel.sockets has them: ("tcp", "listening")."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Whose a socket is. ``relayed``: the containers with transport splice; ``graftd``: the cgroup in which it makes
    its sockets for them, 0 for none. ``by_cgroup``: containers by the cgroups in which their sockets were made.
    ``ferry_ports``: of each container's ferry on the host's loopback, which are no program's.
    """

    relayed: frozenset[int]
    graftd: int
    by_cgroup: Mapping[int, int]
    ferry_ports: Mapping[int, frozenset[int]]

    def of(self, sock: ListedSocket) -> int:
        """The id of the container, 0 for nobody's."""
        if sock.stored is not None:
            tag = layout.Tag.from_buffer_copy(sock.stored)
            if tag.container and tag.home == Home.HOST:
                is_graftds = tag.container in self.relayed and sock.cgroup == self.graftd
                return 0 if is_graftds else int(tag.container)
        number = self.by_cgroup.get(sock.cgroup, 0)
        if sock.protocol == "udp" and int(sock.local.rpartition(":")[2]) in self.ferry_ports.get(number, ()):
            return 0
        return number


def tally(owners: Owners, found: Iterable[ListedSocket]) -> dict[int, Counter[SocketKind]]:
    """The sockets of each container, counted. Pure."""
    counted: dict[int, Counter[SocketKind]] = {}
    for sock in found:
        number = owners.of(sock)
        if number:
            counted.setdefault(number, Counter())[sock.protocol, sock.state] += 1
    return counted


@dataclass(frozen=True, slots=True)
class SocketCounts:
    """Sockets by containers' ids. ``doubts``: what the kernel did not list in time; ``is_whole``: all that it listed
    was counted.
    """

    by_container: Mapping[int, Mapping[SocketKind, int]]
    doubts: Doubts = NO_DOUBTS
    is_whole: bool = True


def count(settings: Settings, maps: Maps, containers: Sequence[Container], stack: HostStack) -> SocketCounts | None:
    """The sockets of ``containers`` in the namespaces of ``stack``. None if the kernel does not answer in time.

    Raises OSError.
    """
    inside = members.of_each([one.cgroup_path for one in containers])
    owners = _owners(settings, maps, containers, stack, inside)
    found = stack_listing.look_at_stack(
        settings, stack.namespaces, owners.by_cgroup.keys(), partial(_counted, owners, _COUNT_SECONDS)
    )
    if found is None:
        return None
    by_container: dict[int, Counter[SocketKind]] = {}
    for _, (counted, _) in found.seen:
        for number, kinds in counted.items():
            by_container.setdefault(number, Counter()).update(kinds)
    return SocketCounts(by_container, found.doubts, all(is_whole for _, (_, is_whole) in found.seen))


def _counted(owners: Owners, seconds: float, listing: Listing) -> tuple[dict[int, Counter[SocketKind]], bool]:
    """`tally` of a listing, as far as it can be read in so many seconds; and whether that is all of it.

    What has no tag, and was made elsewhere, is nobody's: a host may have very many, which are not read.
    """
    end = time.monotonic() + seconds
    of_containers = (one for one in listing if one.is_stored or one.cgroup in owners.by_cgroup)
    counted: dict[int, Counter[SocketKind]] = {}
    while some := list(itertools.islice(of_containers, _AT_A_TIME)):
        for number, kinds in tally(owners, (one.read() for one in some)).items():
            counted.setdefault(number, Counter()).update(kinds)
        if time.monotonic() > end:
            return counted, next(of_containers, None) is None
    return counted, True


def _owners(
    settings: Settings,
    maps: Maps,
    containers: Sequence[Container],
    stack: HostStack,
    inside: Mapping[Path, Members],
) -> Owners:
    by_cgroup: dict[int, int] = {}
    for one in containers:
        its = inside.get(one.cgroup_path)
        by_cgroup.update(dict.fromkeys({one.cgroup_id} if its is None else its.cgroups | {one.cgroup_id}, one.id))
        with contextlib.suppress(OSError):  # it has no supervisor
            by_cgroup[cgroup.cgroup_id(own_cgroup(settings, one.id))] = one.id
    by_cgroup.pop(0, None)  # a record without one
    return Owners(
        relayed=frozenset(one.id for one in containers if one.transport is Transport.SPLICE),
        graftd=stack.graftd,
        by_cgroup=by_cgroup,
        ferry_ports={
            int(key.value): frozenset([int(value.port), *map(int, value.ports6)]) for key, value in maps.ferries.items()
        },
    )
