"""The sockets of the host's stack as the kernel lists them, in child processes that have so much time and no more.

    TCP, TCP that is only bound, UDP ── all of them ── no answer: those made in the containers' cgroups

Any user of the host can have so many sockets of each kind that the kernel lists them for minutes
(graft/kernel/sockdiag.py). None of them are in a container's cgroups. What a container was handed from elsewhere is
found with its processes then (`lent_sockets`); sockets that are only bound, or of MPTCP, and were made elsewhere are
not, nor what was made in a cgroup that is gone and no process of the container has (graft/state/origins.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from graft.kernel import bpf, netns, sockets, tasks
from graft.kernel.sockets import Kind, ListedSocket, Listing, SeenSocket
from graft.model.settings import Settings
from graft.state import helper_process, socket_holders
from graft.state.socket_holders import Place

TIMEOUT, _LONGEST = 2.0, 4.0  # seconds: without an answer, and in all
_NAMES = {Kind.TCP: "TCP", Kind.BOUND: "bound TCP", Kind.UDP: "UDP"}


@dataclass(frozen=True, slots=True)
class Doubts:
    """What the kernel did not list in time: not all ``partial`` sockets, but those made in the containers' cgroups;
    nor these of the kinds ``unlisted``.
    """

    partial: frozenset[Kind] = frozenset()
    unlisted: frozenset[Kind] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Of which kinds a container may have more sockets than were found."""
        missed = self.unlisted | self.partial & {Kind.TCP, Kind.BOUND}
        return tuple(_NAMES[kind] for kind in Kind if kind in missed)

    def and_partial(self, kind: Kind) -> Doubts:
        """These, and that not all of a kind are listed."""
        return replace(self, partial=self.partial | {kind})

    def and_unlisted(self, kind: Kind) -> Doubts:
        """These, and that none of a kind are."""
        return replace(self, unlisted=self.unlisted | {kind})


NO_DOUBTS = Doubts()


@dataclass(frozen=True, slots=True)
class StackListing:
    """Sockets, of containers or not, each with a path of its namespace; ``paths`` are these by the cookies."""

    sockets: list[tuple[Path, SeenSocket]]
    doubts: Doubts
    paths: Mapping[int, Path]


Asked = tuple[Path, Kind, bool]
"""A namespace, what is to be listed there, and whether only of the containers' cgroups."""
SeenT = TypeVar("SeenT")


def list_stack(
    settings: Settings, paths: Sequence[Path], cgroups: Collection[int], earlier: Doubts = NO_DOUBTS
) -> StackListing | None:
    """The sockets of these namespaces. None if the kernel does not answer in time about those of TCP, not even by their
    cgroups. ``earlier``: what was not listed in time before is not asked for again. Raises OSError.
    """
    found = look_at_stack(settings, paths, cgroups, lambda listing: listing, earlier)
    if found is None:
        return None
    sockets_found = [(path, sock) for path, listing in found.seen for sock in listing]
    return StackListing(sockets_found, found.doubts, found.paths)


@dataclass(frozen=True, slots=True)
class SeenStack(Generic[SeenT]):
    """What was seen in listings, each with the path of its namespace; the rest as in `StackListing`."""

    seen: list[tuple[Path, SeenT]]
    doubts: Doubts
    paths: Mapping[int, Path]


def look_at_stack(
    settings: Settings,
    paths: Sequence[Path],
    cgroups: Collection[int],
    look: Callable[[Listing], SeenT],
    earlier: Doubts = NO_DOUBTS,
) -> SeenStack[SeenT] | None:
    """As `list_stack`, but what ``look`` sees in each listing, in the child, as part of its time."""

    def ask(one: Asked) -> tuple[int, SeenT]:
        cookie, listing = _list_namespace(settings, one[0], one[1], cgroups if one[2] else None)
        return cookie, look(listing)

    answers: list[tuple[Path, Kind, tuple[int, SeenT]]] = []
    partial, unlisted = set(earlier.partial), set(earlier.unlisted)
    asked: list[Asked] = [(path, kind, kind in partial) for kind in Kind if kind not in unlisted for path in paths]
    while asked and Kind.TCP not in unlisted:
        found = helper_process.run_each(ask, asked, TIMEOUT, longest=_LONGEST).results
        answers += [(asked[index][0], asked[index][1], answer) for index, answer in found.items()]
        missing = [one for index, one in enumerate(asked) if index not in found]
        unlisted |= {kind for _, kind, is_partial in missing if is_partial}
        partial |= {kind for _, kind, _ in missing}
        asked = [(path, kind, True) for path, kind, is_partial in missing if not is_partial]
    if Kind.TCP in unlisted:
        return None
    return _joined(answers, Doubts(frozenset(partial), frozenset(unlisted)))


def _joined(answers: Iterable[tuple[Path, Kind, tuple[int, SeenT]]], doubts: Doubts) -> SeenStack[SeenT]:
    """A namespace that has several paths counts once."""
    paths: dict[int, Path] = {}
    seen: dict[tuple[int, Kind], SeenT] = {}
    for path, kind, (cookie, one) in answers:
        paths.setdefault(cookie, path)
        seen.setdefault((cookie, kind), one)
    return SeenStack([(paths[cookie], one) for (cookie, _), one in seen.items()], doubts, paths)


def _list_namespace(settings: Settings, path: Path, kind: Kind, cgroups: Collection[int] | None) -> tuple[int, Listing]:
    """The cookie of the namespace at ``path``, and its sockets; none of cookie 0 if it is gone. Raises OSError."""
    storage = bpf.obj_get(settings.pin_dir / "tags")
    try:
        with contextlib.suppress(FileNotFoundError), netns.entered(path):
            return netns.cookie(), sockets.list_sockets(storage, (kind,), cgroups)
    finally:
        os.close(storage)
    return 0, Listing({}, {})


Lent = tuple[Path, ListedSocket]
"""A socket that a process has, and a path of its namespace."""


def lent_sockets(listing: StackListing, pids: Sequence[int], seconds: float) -> tuple[list[Lent], tuple[int, ...]]:
    """The TCP and UDP sockets that these processes have, and that the kernel did not list in time: they were made in
    other cgroups. None where it listed all. And the processes that could not be searched in time: one can keep its
    lock.
    """
    protocols = [kind.value for kind in (Kind.TCP, Kind.UDP) if kind in listing.doubts.partial]
    if not protocols:
        return [], ()
    known = frozenset(sock.inode for _, sock in listing.sockets)
    found = helper_process.run_each(
        lambda pid: _sockets_of(pid, known, protocols), pids, seconds, longest=seconds
    ).results
    lent = {
        one.identity.cookie: (listing.paths[cookie], one)
        for sockets_found in found.values()
        for cookie, one in sockets_found
        if cookie in listing.paths
    }
    return list(lent.values()), tuple(pid for index, pid in enumerate(pids) if index not in found)


def _sockets_of(pid: int, known: frozenset[int], protocols: Sequence[str]) -> list[tuple[int, ListedSocket]]:
    """With the cookies of their namespaces. Waits for the lock of each."""
    found: dict[int, tuple[int, ListedSocket] | None] = {}
    for tid in tasks.descriptor_tables(pid):
        for inode, fd in tasks.open_sockets(tid):
            if inode in known or inode in found:
                continue
            with socket_holders.copied(Place(pid, tid, fd), inode) as copy, contextlib.suppress(OSError):
                found[inode] = None if copy is None else sockets.socket_of(copy, inode, protocols)
    return [one for one in found.values() if one is not None]
