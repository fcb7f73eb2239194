"""The sockets that containers have on the host's stack, as the kernel lists them.

A TCP socket belongs to the container that its tag names: a listing of the namespace's sockets includes the tags (socket
storage), wherever the descriptor is, in a process of the container, in one that received it, or in a message between
two. A socket that no rule granted has no tag; it belongs to a container if it was made in the container's cgroup, or if
a process of the container has it. /proc tells which process has it. The tag of a UDP socket, or of a TCP socket that is
only bound, is not listed: reading it takes a copy of the descriptor.

All of this runs in a child process with a timeout, because a container can delay it (graft/state/helper_process.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graft.datapath import layout
from graft.datapath.dataplane import relays_cgroup
from graft.datapath.maps import Maps
from graft.kernel import cgroup
from graft.kernel.sockets import Kind, ListedSocket, SeenSocket
from graft.model.address import format_ip
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.model.sockaddr import Sockaddr
from graft.model.transport import Home, Transport
from graft.state import helper_process, leftovers, members, origins, socket_holders, stack_listing
from graft.state.installation import Installation
from graft.state.members import Members
from graft.state.records import Container
from graft.state.socket_holders import Place
from graft.state.stack_listing import NO_DOUBTS, Doubts

SEARCH = 5.0
"""Seconds for a search of processes, however steadily results come: by the number of its descriptors each process
decides when its own does.
"""
_ANYWHERE = 1.0  # seconds that a search of all processes has at least
_UNDER_LOCK = 1.0  # seconds without an answer, where others wait for the installation's lock


@dataclass(frozen=True, slots=True)
class HostStack:
    """Where containers may have sockets: the namespaces of the host and of endpoints; and the endpoints, by id.

    ``graftd``: the id of the cgroup in which graftd makes its sockets for containers; 0: there has been none.
    """

    endpoints: Mapping[int, Endpoint]
    namespaces: tuple[Path, ...]
    graftd: int = 0


@contextlib.contextmanager
def host_stack(graft: Installation) -> Iterator[HostStack]:
    """The host stack of now. Inside the block a namespace can be entered even if its endpoint is deleted."""
    stored = graft.endpoints.listing()
    graftd = 0
    with contextlib.suppress(FileNotFoundError):
        graftd = cgroup.cgroup_id(relays_cgroup(graft.settings))
    with graft.endpoints.namespaces(stored) as paths:
        yield HostStack({one.id: one.endpoint for one in stored}, tuple(paths), graftd)


@dataclass(frozen=True, slots=True)
class ContainerSocket:
    """A socket of a container on the host's stack, and the descriptors of it that were found in processes.

    ``namespace`` is a path by which its namespace can be entered. ``granted``: a rule allowed it. ``endpoint`` is the
    name of the endpoint that it was bound to, ``asked`` the address that the program passed to bind; None for others.
    """

    listed: ListedSocket
    namespace: Path
    places: tuple[Place, ...] = ()
    granted: bool = False
    endpoint: str | None = None
    asked: str | None = None

    @property
    def pid(self) -> int:
        """A process that has it, 0 if none was found."""
        return self.places[0].pid if self.places else 0

    def __str__(self) -> str:
        listed = self.listed
        peer = f" with {listed.remote}" if listed.is_connection else ""
        where = f"process {self.pid}" if self.pid else "in no process"
        grant = f", bound as {self.asked} to {self.endpoint}" if self.endpoint and self.asked else ""
        return f"{listed.protocol} {listed.state} {listed.local}{peer} ({where}{grant})"


@dataclass(frozen=True, slots=True)
class Found:
    """The sockets of containers, by their ids. ``unsearched`` are processes of each whose descriptors could not be
    listed in time: what only they have, and was made in another cgroup, is not among these. ``doubts``: what the kernel
    did not list in time. ``unfound`` are those of the containers that may have been granted TCP sockets that are not
    among these: not all were listed, and cgroups of theirs are gone, or were not seen.
    """

    sockets: dict[int, list[ContainerSocket]]
    unsearched: dict[int, tuple[int, ...]]
    doubts: Doubts = NO_DOUBTS
    unfound: frozenset[int] = frozenset()


def sockets_by_container(
    settings: Settings,
    containers: Sequence[Container],
    stack: HostStack,
    listed: Mapping[Path, Members] | None = None,
    closed: Sequence[ContainerSocket] = (),
    seconds: float = SEARCH,
    doubts: Doubts = NO_DOUBTS,
) -> Found | None:
    """The sockets of each of ``containers``. Each namespace is listed once for all of them.

    ``listed`` is what is in their cgroups, if that is known already. Of a container that holds a folder of its cgroups
    only those sockets are found that have its tag, or that were made in its first cgroup. ``closed`` are sockets that
    the kernel may list no more, which are to be found in processes too. ``seconds`` are searched at most, and a little
    longer where no process of a container has a socket. ``doubts`` are from an earlier call. None if the kernel does
    not answer in time. Raises OSError.
    """
    if listed is None:
        listed = members.of_each([container.cgroup_path for container in containers])
    inside = [listed.get(one.cgroup_path, origins.unknown(one)) for one in containers]
    cgroups = {number for one in inside for number in one.cgroups}
    made_in = [origins.of(settings, one, its) for one, its in zip(containers, inside, strict=True)]
    asked = frozenset[int]().union(*(one.cgroups for one in made_in))
    listing = stack_listing.list_stack(settings, stack.namespaces, asked, doubts)
    if listing is None:
        return None
    seen = listing.sockets
    until = time.monotonic() + seconds
    lent, locked = stack_listing.lent_sockets(listing, [pid for one in inside for pid in one.pids], seconds)
    missing = [ContainerSocket(one, path) for path, one in lent]
    cookies = {sock.cookie for _, sock in seen} | {sock.listed.identity.cookie for sock in missing}
    missing += [sock for sock in closed if sock.listed.identity.cookie not in cookies]
    candidates = Candidates.of([*(sock for _, sock in seen), *(sock.listed for sock in missing)])
    searches = _search_each(settings, [one.pids for one in inside], candidates, seconds)
    inodes = {inode for search, _ in searches for inode in search.places}
    on_host = [
        ContainerSocket(sock.read(), path)
        for path, sock in seen
        if sock.is_stored or sock.inode in inodes or sock.cgroup in cgroups
    ] + missing
    by_container: dict[int, list[ContainerSocket]] = {}
    for container, its, (search, _) in zip(containers, inside, searches, strict=True):
        by_container[container.id] = [
            _with_grant(container, stack, search.add_to(sock))
            for sock in on_host
            if search.found(sock) or sock.listed.cgroup in its.cgroups or _is_tagged_for(container, stack, sock)
        ]
    unlocated = [sock for found in by_container.values() for sock in found if not sock.places]
    anywhere = _find_in_all_processes(settings, unlocated, max(until - time.monotonic(), _ANYWHERE))
    sockets_found = {
        container.id: [
            sock if sock.places else _with_grant(container, stack, anywhere.add_to(sock))
            for sock in by_container[container.id]
        ]
        for container, its in zip(containers, inside, strict=True)
    }
    unsearched = {
        container.id: tuple(sorted({*pids, *set(locked).intersection(its.pids)}))
        for container, its, (_, pids) in zip(containers, inside, searches, strict=True)
    }
    is_partial = Kind.TCP in listing.doubts.partial
    unfound = [one.id for one, its in zip(containers, made_in, strict=True) if is_partial and not its.are_all]
    return Found(sockets_found, unsearched, listing.doubts, frozenset(unfound))


def tagged(
    settings: Settings, container: Container, stack: HostStack, doubts: Doubts = NO_DOUBTS
) -> tuple[list[ContainerSocket], Doubts]:
    """The TCP sockets that a container was granted, by their tags alone: no process is searched for them, and whoever
    has them cannot delay this. None of MPTCP. Where the kernel does not list all in time, those that were made in the
    container's cgroups; and ``doubts``, which are from an earlier call, with those of this one.
    """
    found, limit = None, stack_listing.TIMEOUT
    if Kind.TCP not in doubts.partial | doubts.unlisted:
        found = helper_process.run_one(lambda: leftovers.left_of(settings, stack.namespaces, container.id), limit)
    if found is None and Kind.TCP not in doubts.unlisted:
        doubts, made_in = doubts.and_partial(Kind.TCP), origins.of(settings, container).cgroups
        found = helper_process.run_one(
            lambda: leftovers.left_of(settings, stack.namespaces, container.id, made_in), limit
        )
    if found is None:
        doubts = doubts.and_unlisted(Kind.TCP)
    return [_with_grant(container, stack, ContainerSocket(listed, path)) for path, listed in found or ()], doubts


@dataclass(frozen=True, slots=True)
class _Search:
    """What a search of processes found, by inode: descriptors, and the tags that the kernel's listing lacks."""

    places: socket_holders.Places
    tags: Mapping[int, bytes]

    def found(self, sock: ContainerSocket) -> bool:
        """Whether one of the processes has the socket."""
        return sock.listed.inode in self.places

    def add_to(self, sock: ContainerSocket) -> ContainerSocket:
        """The same socket with its descriptors, and its tag if it was read."""
        inode = sock.listed.inode
        stored = self.tags.get(inode, sock.listed.stored)
        return ContainerSocket(replace(sock.listed, stored=stored), sock.namespace, self.places.get(inode, ()))


_NONE_FOUND = _Search({}, {})


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sockets that processes are searched for, by inode. ``untagged``: their tags do not come with the listing, or they
    were found without one.
    """

    inodes: frozenset[int]
    untagged: frozenset[int]

    @classmethod
    def of(cls, listed: Iterable[ListedSocket | SeenSocket]) -> Candidates:
        """Those of a listing."""
        every = [(one.inode, one.protocol == "udp" or one.state == "bound" or _is_lent(one)) for one in listed]
        return cls(frozenset(inode for inode, _ in every), frozenset(inode for inode, untagged in every if untagged))


def _is_lent(one: ListedSocket | SeenSocket) -> bool:
    """Whether it may be from a process (`stack_listing.lent_sockets`), and not from a listing with tags."""
    return isinstance(one, ListedSocket) and one.stored is None


def _find_descriptors(settings: Settings, pids: Iterable[int], candidates: Candidates) -> _Search:
    """Search processes for descriptors of the candidates. (Reading a socket's storage does not take its lock.)"""
    places = socket_holders.find(pids, candidates.inodes)
    maps, tags = Maps(settings.pin_dir), {}
    for inode in candidates.untagged.intersection(places):
        for place in places[inode]:
            with socket_holders.copied(place, inode) as copy:
                tag = None if copy is None else maps.tags.get(ctypes.c_int32(copy))
                if tag is not None:
                    tags[inode] = bytes(tag)
    return _Search(places, tags)


def _search_each(
    settings: Settings, groups: Sequence[Sequence[int]], candidates: Candidates, seconds: float
) -> list[tuple[_Search, tuple[int, ...]]]:
    """Search the processes of each group: what was found, and those that could not be searched in time. Each process is
    searched on its own, so that one hides nothing of the others.
    """
    items = [(index, pid) for index, pids in enumerate(groups) for pid in pids]
    found = helper_process.run_each(
        lambda item: _find_descriptors(settings, [item[1]], candidates), items, min(seconds, SEARCH), longest=seconds
    ).results
    by_group: list[tuple[list[_Search], list[int]]] = [([], []) for _ in groups]
    for number, (index, pid) in enumerate(items):
        if number in found:
            by_group[index][0].append(found[number])
        else:
            by_group[index][1].append(pid)
    return [(_merged(searches), tuple(unsearched)) for searches, unsearched in by_group]


def _find_in_all_processes(settings: Settings, unlocated: Sequence[ContainerSocket], seconds: float) -> _Search:
    """Search every process of the machine for sockets that no process of a container has."""
    if not unlocated:
        return _NONE_FOUND
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return _search_each(settings, [pids], Candidates.of(sock.listed for sock in unlocated), seconds)[0][0]


def _merged(searches: Iterable[_Search]) -> _Search:
    """What several searches found together."""
    places: socket_holders.Places = {}
    tags: dict[int, bytes] = {}
    for search in searches:
        for inode, found in search.places.items():
            places[inode] = (*places.get(inode, ()), *found)
        tags.update(search.tags)
    return _Search(places, tags)


def _tag_of(sock: ContainerSocket) -> layout.Tag | None:
    return None if sock.listed.stored is None else layout.Tag.from_buffer_copy(sock.listed.stored)


def _is_tagged_for(container: Container, stack: HostStack, sock: ContainerSocket) -> bool:
    """Whether it is the container's own on the host's stack. (With transport splice graftd's sockets have the tag too.
    All others are of its programs, which may have had threads or sockets in the host's namespace, and have removed the
    cgroup that they made them in.)
    """
    tag = _tag_of(sock)
    if tag is None or (container.transport is Transport.SPLICE and sock.listed.cgroup == stack.graftd):
        return False
    return bool(tag.container == container.id and tag.home == Home.HOST)


def _with_grant(container: Container, stack: HostStack, sock: ContainerSocket) -> ContainerSocket:
    """The same socket with whether a rule granted it, and at which endpoint: by its tag."""
    tag = _tag_of(sock)
    if tag is None or not _is_tagged_for(container, stack, sock):
        return _with_grant_by_address(container, stack, sock)
    if not tag.endpoint:
        # A swapped socket is on the host's stack only by a rule; a direct container's sockets always are.
        return replace(sock, granted=container.transport.is_supervised)
    endpoint = stack.endpoints.get(tag.endpoint)
    asked = str(Sockaddr(tag.family, bytes(tag.addr), tag.port)) if tag.bound_port else None
    return replace(sock, granted=True, endpoint=endpoint.name if endpoint else "(deleted)", asked=asked)


def _with_grant_by_address(container: Container, stack: HostStack, sock: ContainerSocket) -> ContainerSocket:
    """For UDP sockets that no process has, so that no tag can be read: granted if at an endpoint of the container."""
    if sock.listed.protocol != "udp" or sock.places:
        return sock
    for endpoint in stack.endpoints.values():
        if endpoint.name in container.endpoints and _is_at(endpoint, sock.listed.local):
            return replace(sock, granted=True, endpoint=endpoint.name)
    return sock


def _is_at(endpoint: Endpoint, local: str) -> bool:
    """Whether a local address is the endpoint's. (Of a dynamic one it cannot be told.)"""
    address, _, port = local.rpartition(":")
    last = endpoint.last_port or endpoint.port
    return address == format_ip(endpoint.address) and endpoint.port <= int(port) <= last


@dataclass(frozen=True, slots=True)
class Existing:
    """The sockets that a container had before it was attached. ``unsearched`` are processes whose descriptors could not
    be listed: what only they have, and was made in another cgroup, is not among these. ``doubts``: what the kernel did
    not list in time.
    """

    sockets: tuple[ContainerSocket, ...]
    unsearched: tuple[int, ...] = ()
    doubts: Doubts = NO_DOUBTS


def host_sockets_of(settings: Settings, inside: Members) -> Existing | None:
    """The sockets of a container that is not attached yet, in the host's namespace only.

    None if the kernel does not answer in time.
    """
    listing = stack_listing.list_stack(settings, (settings.host_netns,), inside.cgroups)
    if listing is None:
        return None
    seen = [sock for _, sock in listing.sockets]
    lent, locked = stack_listing.lent_sockets(listing, inside.pids, SEARCH)
    candidates = Candidates.of([*seen, *(one for _, one in lent)])
    [(search, unsearched)] = _search_each(settings, [inside.pids], candidates, SEARCH)
    own = [sock.read() for sock in seen if sock.inode in search.places or sock.cgroup in inside.cgroups]
    own += [one for _, one in lent]
    return Existing(
        tuple(search.add_to(ContainerSocket(one, settings.host_netns)) for one in own),
        tuple(sorted({*unsearched, *locked})),
        listing.doubts,
    )


def made_since(
    settings: Settings, container: int, inside: Members, before: Existing
) -> tuple[ContainerSocket, ...] | None:
    """What a container that is attached now has made since `host_sockets_of` listed its sockets, and before its hooks
    saw it. None if the kernel does not answer in time.

    By the cgroups where they were made: no process is searched for what is there, only for the tags of these.
    """
    listing = stack_listing.list_stack(settings, (settings.host_netns,), inside.cgroups, before.doubts)
    if listing is None:
        return None
    known = {sock.listed.identity.cookie for sock in before.sockets}
    new = [
        ContainerSocket(sock.read(), settings.host_netns)
        for _, sock in listing.sockets
        if sock.cgroup in inside.cgroups and sock.cookie not in known
    ]
    if not new:
        return ()
    candidates = Candidates.of(sock.listed for sock in new)
    [(search, _)] = _search_each(settings, [inside.pids], candidates, _UNDER_LOCK)
    tags = [(sock, _tag_of(sock)) for sock in map(search.add_to, new)]
    return tuple(sock for sock, tag in tags if tag is None or tag.container != container)


def is_cut_off(sock: ContainerSocket) -> bool:
    """Whether it receives nothing in a container with transport direct, unless `keep_reachable` has tagged it."""
    return sock.listed.protocol == "udp" or sock.listed.state == "listening"


def keep_reachable(
    settings: Settings, container: int, existing: Sequence[ContainerSocket]
) -> tuple[ContainerSocket, ...]:
    """Tag listeners that were there before the direct container ``container`` was attached, so that the packet hooks
    continue to let packets reach them. Gives those of which no process answered, or none has it.

    Under the installation's lock, so it takes two seconds at most: a process that executes another program lends its
    descriptors to nobody until that has begun (exec_update_lock), which it can delay.
    """
    listeners = [sock for sock in existing if is_cut_off(sock)]
    tagged = helper_process.run_each(
        lambda sock: _tag_open_port(settings, container, sock), listeners, timeout=_UNDER_LOCK, longest=2 * _UNDER_LOCK
    ).results
    return tuple(sock for index, sock in enumerate(listeners) if not tagged.get(index))


def _tag_open_port(settings: Settings, container: int, sock: ContainerSocket) -> bool:
    """Through a copy of a process's descriptor. (Writing a tag does not take the socket's lock.) False without one."""
    port = int(sock.listed.local.rpartition(":")[2])
    tag = layout.Tag(container=container, home=Home.HOST, open_port=port, since=time.monotonic_ns())
    for place in sock.places:
        with socket_holders.copied(place, sock.listed.inode) as copy, contextlib.suppress(OSError):
            if copy is not None:
                Maps(settings.pin_dir).tags.put(ctypes.c_int32(copy), tag)
                return True
    return False
