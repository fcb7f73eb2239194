"""Closes what outlives a container: its sockets on the host's stack that another process was handed.

They reach nobody (bpf/ingress.bpf.c), but would keep their endpoints' ports. `graft detach` looks for all of a
container's sockets (graft/state/withdrawal.py); this runs at the end of every container, nearly always in vain: one
listing of the TCP sockets, by their tags, without a search for their processes. A child does it, with a time limit: how
long a listing takes is up to whoever has sockets on the host, and a socket that is locked hangs. Where all are not
listed in time, those are that were made in the container's own cgroup, or its supervisor's (graft/state/origins.py).

What cannot be closed by a request to the kernel stays: UDP and MPTCP sockets, those that are only bound, and all where
a request could block others (before 6.9). So do, where not all are listed in time, those that were made in cgroups
below the container's own, which are gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from graft.datapath import layout
from graft.kernel import bpf, netns, process, sockets
from graft.kernel.sockets import ListedSocket
from graft.model.settings import Settings
from graft.model.transport import Home, Transport
from graft.state import detached, helper_process, origins
from graft.state.installation import Installation
from graft.state.origins import Place
from graft.state.records import Container

_ROUNDS = 3  # whoever has a listener may accept what waits there until that is closed
_TIMEOUT = 3.0  # seconds in all; a socket that is locked is left
_LISTING = 1.0  # seconds for a listing of all
_ANY_LISTING = 2  # seconds after which a child is ended that waits for a listing

Left = tuple[Path, ListedSocket]
"""A socket, and the path of its namespace."""
IsLeft = Callable[[layout.Tag], bool]


@contextlib.contextmanager
def closed_after(graft: Installation, *containers: Container) -> Iterator[None]:
    """Close what is left of ``containers``, which have ended and which the block removes."""
    numbers = {one.id for one in containers if one.transport is not Transport.SPLICE}
    if not numbers or not sockets.can_destroy():
        yield
        return
    cgroups = origins.of_ended(graft.settings, containers)
    with graft.endpoints.namespaces(graft.endpoints.listing()) as paths:  # the block may remove endpoints
        yield
        is_slow = False
        for number in numbers:
            is_slow = _close(graft, Place(tuple(paths), cgroups), prefix_of(number), lambda _: True, is_slow)


def close_all(graft: Installation) -> None:
    """Close what is left of every container, and what those with a supervisor have: before the hooks are removed.

    Not what programs have that are, or were, attached without a supervisor, and go on.
    """
    if not sockets.can_destroy():
        return
    others = {key.value for key, value in graft.maps.containers.items() if not Transport(value.transport).is_supervised}
    others |= detached.numbers(graft.settings)
    cgroups = origins.of_each(
        graft.settings, [one for one in graft.containers.listing() if one.transport.is_supervised]
    )
    with graft.endpoints.namespaces(graft.endpoints.listing()) as paths:
        _close(graft, Place(tuple(paths), cgroups), b"", lambda tag: tag.container not in others)


def left_of(
    settings: Settings, paths: Sequence[Path], number: int, cgroups: frozenset[int] | None = None
) -> list[Left]:
    """The TCP sockets that a container has in those namespaces of the host's stack; ``cgroups``: only those that were
    made in one of these. Takes no socket's lock. Raises OSError.
    """
    storage = bpf.obj_get(settings.pin_dir / "tags")
    try:
        return _find(storage, paths, prefix_of(number), lambda _: True, cgroups)
    finally:
        os.close(storage)


def close_in_child(
    settings: Settings, place: Place, prefix: bytes, is_left: IsLeft = lambda _: True, is_slow: bool = False
) -> bool:
    """Close the sockets whose tags begin with ``prefix``. Only for a child: this ends it if a listing takes too long
    even of those that were made in the place's cgroups, and may never return. ``is_slow``: only those are listed; true
    is returned where that was so in the end.
    """
    with contextlib.suppress(OSError):
        storage = bpf.obj_get(settings.pin_dir / "tags")
        for _ in range(_ROUNDS):
            process.end_after(_ANY_LISTING)
            left: list[Left] = []
            if not is_slow:
                try:
                    left = _find(storage, place.paths, prefix, is_left, None, _LISTING)
                except TimeoutError:
                    is_slow = True
            if is_slow:
                left = _find(storage, place.paths, prefix, is_left, place.cgroups)
            process.end_after(0)
            if not left:
                break
            for _ in helper_process.run_in_threads(destroy, left):
                pass
    return is_slow


def destroy(left: Left) -> None:
    """Close a socket, if it is still there. May never return."""
    path, one = left
    with contextlib.suppress(OSError), netns.entered(path):
        sockets.destroy(one)


def prefix_of(number: int) -> bytes:
    """How the tags of a container begin."""
    return bytes(layout.Tag(container=number))[: layout.Tag.endpoint.offset]


def _close(graft: Installation, place: Place, prefix: bytes, is_left: IsLeft, is_slow: bool = False) -> bool:
    """By a child; whether not all sockets were listed in time."""
    with contextlib.suppress(OSError):
        done = helper_process.run_one(lambda: close_in_child(graft.settings, place, prefix, is_left, is_slow), _TIMEOUT)
        return is_slow if done is None else done
    return is_slow


def _find(
    storage: int,
    paths: Sequence[Path],
    prefix: bytes,
    is_left: IsLeft,
    cgroups: frozenset[int] | None,
    seconds: float | None = None,
) -> list[Left]:
    """Raises TimeoutError where it takes longer."""
    listed: dict[int, list[Left]] = {}
    until = None if seconds is None else time.monotonic() + seconds
    for path in paths:
        with contextlib.suppress(FileNotFoundError), netns.entered(path):
            cookie = netns.cookie()
            if cookie not in listed:
                left = None if until is None else until - time.monotonic()
                listed[cookie] = [(path, one) for one in sockets.list_tcp(storage, prefix, cgroups, left)]
    tagged = [(one, layout.Tag.from_buffer_copy(one[1].stored or b"")) for found in listed.values() for one in found]
    return [one for one, tag in tagged if tag.home == Home.HOST and is_left(tag)]
