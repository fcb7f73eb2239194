"""Closes what outlives a container: its sockets on the host's stack that another process was handed.

They reach nobody (bpf/ingress.bpf.c), but would keep their endpoints' ports. `graft detach` looks for all of a
container's sockets (graft/state/withdrawal.py); this runs at the end of every container, nearly always in vain: one
listing of the TCP sockets, by their tags, without a search for their processes. A child does it, with a time limit: how
long a listing takes is up to whoever has sockets on the host, and a socket that is locked hangs.

What cannot be closed by a request to the kernel stays: UDP and MPTCP sockets, those that are only bound, and all where
a request could block others (before 6.9).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from graft.datapath import layout
from graft.kernel import bpf, netns, process, sockets
from graft.kernel.sockets import ListedSocket
from graft.model.settings import Settings
from graft.model.transport import Home, Transport
from graft.state import detached, helper_process
from graft.state.installation import Installation
from graft.state.records import Container

_ROUNDS = 3  # whoever has a listener may accept what waits there until that is closed
_TIMEOUT = 3.0  # seconds in all; a socket that is locked is left
_LISTING = 1  # seconds for each listing

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
    with graft.endpoints.namespaces(graft.endpoints.listing()) as paths:  # the block may remove endpoints
        yield
        for number in numbers:
            _close(graft, paths, prefix_of(number), lambda _: True)


def close_all(graft: Installation) -> None:
    """Close what is left of every container, and what those with a supervisor have: before the hooks are removed.

    Not what programs have that are, or were, attached without a supervisor, and go on.
    """
    if not sockets.can_destroy():
        return
    others = {key.value for key, value in graft.maps.containers.items() if not Transport(value.transport).is_supervised}
    others |= detached.numbers(graft.settings)
    with graft.endpoints.namespaces(graft.endpoints.listing()) as paths:
        _close(graft, paths, b"", lambda tag: tag.container not in others)


def left_of(settings: Settings, paths: Sequence[Path], number: int) -> list[Left]:
    """The TCP sockets that a container has in those namespaces of the host's stack. Takes no socket's lock.

    Raises OSError.
    """
    storage = bpf.obj_get(settings.pin_dir / "tags")
    try:
        return _find(storage, paths, prefix_of(number), lambda _: True)
    finally:
        os.close(storage)


def close_in_child(settings: Settings, paths: Sequence[Path], prefix: bytes, is_left: IsLeft = lambda _: True) -> None:
    """Close the sockets whose tags begin with ``prefix``. Only for a child: this ends it if a listing takes too long,
    and may never return.
    """
    with contextlib.suppress(OSError):
        storage = bpf.obj_get(settings.pin_dir / "tags")
        for _ in range(_ROUNDS):
            process.end_after(_LISTING)
            left = _find(storage, paths, prefix, is_left)
            process.end_after(0)
            if not left:
                return
            for _ in helper_process.run_in_threads(destroy, left):
                pass


def destroy(left: Left) -> None:
    """Close a socket, if it is still there. May never return."""
    path, one = left
    with contextlib.suppress(OSError), netns.entered(path):
        sockets.destroy(one)


def prefix_of(number: int) -> bytes:
    """How the tags of a container begin."""
    return bytes(layout.Tag(container=number))[: layout.Tag.endpoint.offset]


def _close(graft: Installation, paths: Sequence[Path], prefix: bytes, is_left: IsLeft) -> None:
    with contextlib.suppress(OSError):
        helper_process.run_one(lambda: close_in_child(graft.settings, paths, prefix, is_left), _TIMEOUT)


def _find(storage: int, paths: Sequence[Path], prefix: bytes, is_left: IsLeft) -> list[Left]:
    listed: dict[int, list[Left]] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError), netns.entered(path):
            cookie = netns.cookie()
            if cookie not in listed:
                listed[cookie] = [(path, one) for one in sockets.list_tcp(storage, prefix)]
    tagged = [(one, layout.Tag.from_buffer_copy(one[1].stored or b"")) for found in listed.values() for one in found]
    return [one for one, tag in tagged if tag.home == Home.HOST and is_left(tag)]
