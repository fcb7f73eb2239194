"""The sockets that a container holds on the host's stack, as the kernel knows them.

Whose a TCP socket is, says its tag: a listing of every socket of the namespace comes with it (socket storage), wherever
the descriptor is, in a process of the container's, in one that got it from there, or on its way between two. A
socket that no rule granted has no tag; it is a container's if it was born in its cgroup, or a process of its has it.
/proc tells which process that is. The tag of a UDP socket, or of a TCP socket that is bound and does nothing, is not
listed: it takes a copy of the descriptor to read.

All of it is asked in a child that a container can hold up, and that is not waited for then
(graft/state/helper_process.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.kernel import bpf, cgroup, netns, sockets
from graft.kernel.sockets import ListedSocket
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.model.sockaddr import Sockaddr
from graft.model.transport import Home, Transport
from graft.state import descriptors, helper_process
from graft.state.descriptors import Place
from graft.state.installation import Installation
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class HostStack:
    """Where containers may have sockets: the namespaces of the host and of endpoints; and these, by their ids."""

    endpoints: Mapping[int, Endpoint]
    namespaces: tuple[Path, ...]


@contextlib.contextmanager
def host_stack(graft: Installation) -> Iterator[HostStack]:
    """What there is now; while this lasts, a namespace can be entered also if its endpoint goes."""
    stored = graft.endpoints.listing()
    with contextlib.ExitStack() as opened:
        paths = [graft.settings.host_netns]
        for one in stored:
            with contextlib.suppress(OSError):
                if one.endpoint.netns is not None:
                    fd = os.open(graft.endpoints.netns_path(one), os.O_RDONLY | os.O_CLOEXEC)
                    opened.callback(os.close, fd)
                    paths.append(Path(f"/proc/{os.getpid()}/fd/{fd}"))
        yield HostStack({one.id: one.endpoint for one in stored}, tuple(paths))


@dataclass(frozen=True, slots=True)
class ContainerSocket:
    """A socket of a container on the host's stack, and the places where processes have it, as far as they were found.

    ``namespace`` is where its namespace can be entered. ``granted``: a rule let it be. ``endpoint`` names what it was
    bound to by one, ``asked`` is the address that the program bound; both None for any other.
    """

    listed: ListedSocket
    namespace: Path
    places: tuple[Place, ...] = ()
    granted: bool = False
    endpoint: str | None = None
    asked: str | None = None

    @property
    def pid(self) -> int:
        """A process that has it, 0 where none was found."""
        return self.places[0].pid if self.places else 0

    def __str__(self) -> str:
        one = self.listed
        peer = f" with {one.remote}" if one.is_connection else ""
        where = f"process {self.pid}" if self.pid else "in no process"
        grant = f", bound as {self.asked} to {self.endpoint}" if self.endpoint and self.asked else ""
        return f"{one.protocol} {one.state} {one.local}{peer} ({where}{grant})"


def of(
    settings: Settings, containers: Sequence[Container], stack: HostStack
) -> dict[int, list[ContainerSocket]] | None:
    """The sockets of each of ``containers``, by its id. The kernel is asked once for all of them.

    None where it does not answer. Raises OSError.
    """
    there = _listed(settings, stack)
    if there is None:
        return None
    known = helper_process.each(
        lambda one: _look(settings, cgroup.processes(one.cgroup_path), there), containers
    ).results
    found: dict[int, list[ContainerSocket]] = {}
    for number, container in enumerate(containers):
        born, places = cgroup.ids(container.cgroup_path), known.get(number, _NOWHERE)
        its_own = [one for one in there if places.has(one) or one.listed.cgroup in born or _is_tagged(container, one)]
        found[container.id] = [_read(container, stack, places.complete(one)) for one in its_own]
    others = _others(settings, [one for held in found.values() for one in held if not one.places])
    return {
        one.id: [held if held.places else _read(one, stack, others.complete(held)) for held in found[one.id]]
        for one in containers
    }


def _others(settings: Settings, lost: Sequence[ContainerSocket]) -> _Whereabouts:
    """Where any process of the machine has sockets that none of the containers' own has any more."""
    if not lost:
        return _NOWHERE
    everybody = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    known = helper_process.each(lambda pid: _look(settings, [pid], lost), everybody).results.values()
    places = {inode: where for one in known for inode, where in one.places.items()}
    return _Whereabouts(places, {inode: tag for one in known for inode, tag in one.tags.items()})


@dataclass(frozen=True, slots=True)
class _Whereabouts:
    """Where some processes have which sockets, and the tags of those that are listed without; by inode."""

    places: descriptors.Places
    tags: Mapping[int, bytes]

    def has(self, one: ContainerSocket) -> bool:
        """Whether one of the processes has it."""
        return one.listed.inode in self.places

    def complete(self, one: ContainerSocket) -> ContainerSocket:
        """The same socket with what is known of it."""
        inode = one.listed.inode
        stored = self.tags.get(inode, one.listed.stored)
        return ContainerSocket(replace(one.listed, stored=stored), one.namespace, self.places.get(inode, ()))


_NOWHERE = _Whereabouts({}, {})


def _look(settings: Settings, pids: Iterable[int], there: Sequence[ContainerSocket]) -> _Whereabouts:
    """Where processes have these sockets. (A look into a socket's storage does not take its lock.)"""
    places = descriptors.find(pids, frozenset(one.listed.inode for one in there))
    maps, tags = Maps(settings.pin_dir), {}
    without = [one.listed.inode for one in there if one.listed.protocol == "udp" or one.listed.state == "bound"]
    for inode in without:
        for place in places.get(inode, ()):
            with descriptors.copied(place, inode) as copy:
                tag = None if copy is None else maps.tags.get(ctypes.c_int32(copy))
                if tag is not None:
                    tags[inode] = bytes(tag)
    return _Whereabouts(places, tags)


def _is_tagged(container: Container, one: ContainerSocket) -> bool:
    """Whether it is on the host's stack for that container. (graftd's, for transport splice, are its own.)"""
    tag = _tag(one)
    if tag is None or container.transport is Transport.SPLICE:
        return False
    return bool(tag.container == container.id and tag.home == Home.HOST)


def _tag(one: ContainerSocket) -> layout.Tag | None:
    return None if one.listed.stored is None else layout.Tag.from_buffer_copy(one.listed.stored)


def _read(container: Container, stack: HostStack, one: ContainerSocket) -> ContainerSocket:
    """The same socket with what its tag says of it."""
    tag = _tag(one)
    if tag is None or not _is_tagged(container, one):
        return _guessed(container, stack, one)
    if not tag.endpoint:
        # A swapped socket is on the host's stack by a rule only; one of a direct container's is there anyway.
        return replace(one, granted=container.transport is Transport.SWAP)
    endpoint = stack.endpoints.get(tag.endpoint)
    asked = str(Sockaddr(tag.family, bytes(tag.addr), tag.port)) if tag.bound_port else None
    return replace(one, granted=True, endpoint=endpoint.name if endpoint else "(deleted)", asked=asked)


def _guessed(container: Container, stack: HostStack, one: ContainerSocket) -> ContainerSocket:
    """A UDP socket whose tag nobody's descriptor leads to: granted if it is where an endpoint of its container is."""
    if one.listed.protocol != "udp" or one.places:
        return one
    for endpoint in stack.endpoints.values():
        if endpoint.name in container.endpoints and endpoint.spec == one.listed.local:
            return replace(one, granted=True, endpoint=endpoint.name)
    return one


def host_sockets_of(settings: Settings, pids: Iterable[int]) -> list[ContainerSocket] | None:
    """The sockets of processes that are not attached yet, in the host's namespace only. None where nobody answers."""
    there = helper_process.one(lambda: _ask(settings, settings.host_netns)[1])
    if there is None:
        return None
    places = helper_process.one(lambda: _look(settings, pids, there)) or _NOWHERE
    return [places.complete(one) for one in there if places.has(one)]


def mark_open(settings: Settings, container: int, existing: Sequence[ContainerSocket]) -> None:
    """Let go on hearing what heard before its container, the direct one ``container``, came under a policy."""
    listeners = [one for one in existing if one.listed.protocol == "udp" or one.listed.state == "listening"]
    helper_process.each(lambda one: _mark_open(settings, container, one), listeners)


def _mark_open(settings: Settings, container: int, one: ContainerSocket) -> None:
    """By a descriptor of one of the processes that have it. (A tag is written without the socket's lock.)"""
    tag = layout.Tag(container=container, home=Home.HOST, open_port=int(one.listed.local.rpartition(":")[2]))
    for place in one.places:
        with descriptors.copied(place, one.listed.inode) as copy, contextlib.suppress(OSError):
            if copy is not None:
                Maps(settings.pin_dir).tags.put(ctypes.c_int32(copy), tag)
                return


def _listed(settings: Settings, stack: HostStack) -> list[ContainerSocket] | None:
    """The sockets on the host's stack, of whomever they are."""
    answers = helper_process.each(lambda path: _ask(settings, path), stack.namespaces).results
    if len(answers) < len(stack.namespaces):
        return None
    by_namespace: dict[int, list[ContainerSocket]] = {}
    for number in range(len(answers)):
        by_namespace.setdefault(*answers[number])
    return [one for held in by_namespace.values() for one in held]


def _ask(settings: Settings, path: Path) -> tuple[int, list[ContainerSocket]]:
    """The cookie of the namespace at ``path``, and its sockets; none of one that is gone. Raises OSError."""
    storage = bpf.obj_get(settings.pin_dir / "tags")
    try:
        with contextlib.suppress(FileNotFoundError), netns.entered(path):
            return netns.cookie(), [ContainerSocket(one, path) for one in sockets.list_sockets(storage)]
    finally:
        os.close(storage)
    return 0, []
