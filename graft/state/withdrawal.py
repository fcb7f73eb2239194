"""Takes from a container what it was granted: its sockets on the host's stack end.

    list ── end each that a rule granted, wherever its descriptor is ── list again, for what came meanwhile ...

To end a socket takes its lock, and whoever has that (a send() that waits for a page of memory which never comes) can
keep it. So it is done in a child, which goes on with those that hang when everybody else has gone on (expendable.py).

A TCP socket is ended by the kernel on request (SOCK_DESTROY). On a kernel where that could keep others waiting, or that
cannot do it, and for MPTCP and UDP, of which a request would end a part only, it takes a descriptor: a copy is shut
down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graft.kernel import netns, sockets
from graft.model.settings import Settings
from graft.state import descriptors, helper_process, inventory
from graft.state.inventory import ContainerSocket, HostStack
from graft.state.records import Container

_ROUNDS = 4
_HARMLESS = "bound"  # to end it is to close it; the hooks let it neither listen nor connect


@dataclass(slots=True)
class Withdrawn:
    """What became of a container's sockets: ended; not ended, though it should be; left as they are.

    ``known`` is False where the kernel did not tell which there are. ``helper`` is the process that still tries to end
    those that are not ended (0: none does).
    """

    ended: list[ContainerSocket] = field(default_factory=list)
    unended: list[ContainerSocket] = field(default_factory=list)
    left: list[ContainerSocket] = field(default_factory=list)
    known: bool = True
    helper: int = 0


def withdraw(settings: Settings, container: Container, stack: HostStack, keep_connections: bool) -> Withdrawn:
    """End the sockets that ``container`` was granted. Its rules have to be gone, so that no more are granted.

    ``stack`` is what there was with them.
    """
    done = Withdrawn()
    tried: set[bytes] = set()
    for rounds_left in reversed(range(_ROUNDS)):
        found = inventory.of(settings, [container], stack)
        if found is None:
            done.known = False
            break
        present = found[container.id]
        ended = {one.listed.identity.cookie for one in done.ended}
        done.unended = [one for one in present if one.listed.identity.cookie in tried]
        done.left = [one for one in present if one.listed.identity.cookie not in ended | tried]
        due = [one for one in done.left if _is_due(one, keep_connections)]
        if not due:
            break
        if not rounds_left:
            done.unended += due
            done.left = [one for one in done.left if one not in due]
            break
        tried |= _end(due, done)
    return done


def _is_due(one: ContainerSocket, keep_connections: bool) -> bool:
    return one.granted and one.listed.state != _HARMLESS and not (keep_connections and one.listed.is_connection)


def _end(due: Sequence[ContainerSocket], done: Withdrawn) -> set[bytes]:
    """End what is due; gives the cookies of those that it did not work for."""
    outcome = helper_process.each(end, due, finish=True)
    done.helper = outcome.left_behind or done.helper
    done.ended += [one for number, one in enumerate(due) if outcome.results.get(number)]
    return {one.listed.identity.cookie for number, one in enumerate(due) if not outcome.results.get(number)}


def end(one: ContainerSocket) -> bool:
    """Take a socket out of use: a listener stops listening, a connection ends, datagrams stop coming.

    False where it cannot be done, be it that it is gone already. May never return.
    """
    if one.listed.is_mptcp:
        return _shut_down(one) or _destroy(one)
    if one.listed.protocol == "tcp":
        return _destroy(one) or _shut_down(one)
    deaf = _shut_down(one)
    _destroy(one)
    return deaf


def _destroy(one: ContainerSocket) -> bool:
    if not sockets.can_destroy():
        return False
    try:
        with netns.entered(one.namespace):
            sockets.destroy(one.listed)
    except OSError:
        return False
    return True


def _shut_down(one: ContainerSocket) -> bool:
    """By a descriptor of one of the processes that have it."""
    for place in one.places:
        with descriptors.copied(place, one.listed.inode) as copy:
            if copy is not None:
                if one.listed.protocol == "udp":
                    sockets.drop_incoming(copy)
                sockets.shut_down(copy)
                return True
    return False
