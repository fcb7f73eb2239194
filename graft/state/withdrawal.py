"""Withdraws what a container was granted: closes its sockets on the host's stack.

    list by tags ── close ── list all, search for who has them ── close what a rule granted ── list all again ...

First what the kernel closes by its number alone: to search the processes for the others takes seconds, if these have
very many descriptors.

Closing takes the socket's lock, and a process that has the lock can keep it (in a send() that waits for a page of
memory which never arrives). So this runs in a child process, which continues with the sockets that hang after all
others are done (graft/state/helper_process.py).

The kernel closes a TCP socket on request (SOCK_DESTROY). On a kernel where the request could block others or is not
supported, and for MPTCP and UDP, of which a request would close only a part, a copy of the descriptor is shut down.
One of UDP keeps its port all the same, and is tied to an interface that cannot exist: it is in nobody's way then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graft.kernel import netns, sockets
from graft.kernel.sockets import Kind
from graft.state import helper_process, inventory, socket_holders
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket, HostStack
from graft.state.records import Container
from graft.state.stack_listing import NO_DOUBTS, Doubts

_ROUNDS = 4
_AGAIN = 1.0  # seconds for a search of processes after the first
_HARMLESS = "bound"  # it can only be closed by its program; the hooks let it neither listen nor connect


@dataclass(slots=True)
class Withdrawal:
    """What was done with a container's sockets: closed; still open, though they should be closed; kept on purpose.

    ``all_listed`` is False if the kernel did not list in time what may have to be closed; ``doubts`` is what it did not
    list. ``unfound``: TCP sockets may be open that were made in cgroups of the container which are gone by now, or were
    not seen; of the others all were listed. ``helper_pid`` is the process that still tries to close those that are open
    (0: none does). ``unsearched`` are processes that could not be searched in time.
    """

    closed: list[ContainerSocket] = field(default_factory=list)
    still_open: list[ContainerSocket] = field(default_factory=list)
    kept: list[ContainerSocket] = field(default_factory=list)
    all_listed: bool = True
    helper_pid: int = 0
    unsearched: tuple[int, ...] = ()
    doubts: Doubts = NO_DOUBTS
    unfound: bool = False


def withdraw(graft: Installation, container: Container, stack: HostStack, keep_connections: bool) -> Withdrawal:
    """Close the sockets that ``container`` was granted. Its rules must be gone, so that no more are granted.

    ``stack`` is the host stack from before the rules went. Raises what `Installation.refuse_replaced` raises: in
    another data plane the number is another container's. (That is asked after each listing: what was listed before is
    this one's.)
    """
    done = Withdrawal()
    tried = _close_tagged(graft, container, stack, keep_connections, done)
    seconds = inventory.SEARCH
    for rounds_left in reversed(range(_ROUNDS)):
        found = inventory.sockets_by_container(
            graft.settings, [container], stack, closed=done.closed, seconds=seconds, doubts=done.doubts
        )
        graft.refuse_replaced()
        if found is None:
            done.all_listed = False
            break
        seconds, done.doubts, done.unfound = _AGAIN, found.doubts, container.id in found.unfound
        present = {sock.listed.identity.cookie: sock for sock in found.sockets[container.id]}
        done.unsearched = found.unsearched[container.id]
        done.closed = [_located(sock, present) for sock in done.closed]
        closed = {sock.listed.identity.cookie for sock in done.closed}
        done.still_open = [sock for cookie, sock in present.items() if cookie in tried]
        done.kept = [sock for cookie, sock in present.items() if cookie not in closed | tried]
        to_close = [sock for sock in done.kept if _must_close(sock, keep_connections)]
        if not to_close:
            break
        if not rounds_left:
            done.still_open += to_close
            done.kept = [sock for sock in done.kept if sock not in to_close]
            break
        hung, failed = _close_all(to_close, done)
        tried |= hung | failed
    done.all_listed = done.all_listed and Kind.UDP not in done.doubts.unlisted
    return done


def _close_tagged(
    graft: Installation, container: Container, stack: HostStack, keep_connections: bool, done: Withdrawal
) -> set[bytes]:
    """Close the TCP sockets that their tags name, without a look into any process; the cookies of those that hang. What
    the kernel does not list in time is not asked for again.
    """
    hung: set[bytes] = set()
    seen: set[bytes] = set()
    if sockets.can_destroy():
        for _ in range(_ROUNDS):
            found, done.doubts = inventory.tagged(graft.settings, container, stack, done.doubts)
            graft.refuse_replaced()
            new = [
                one for one in found if one.listed.identity.cookie not in seen and _must_close(one, keep_connections)
            ]
            if not new:
                break
            seen |= {one.listed.identity.cookie for one in new}
            hung |= _close_all(new, done)[0]
    return hung


def _located(sock: ContainerSocket, present: Mapping[bytes, ContainerSocket]) -> ContainerSocket:
    """A socket with the processes that have it, if a search has found any."""
    return replace(sock, places=sock.places or present.get(sock.listed.identity.cookie, sock).places)


def _must_close(sock: ContainerSocket, keep_connections: bool) -> bool:
    return sock.granted and sock.listed.state != _HARMLESS and not (keep_connections and sock.listed.is_connection)


def _close_all(to_close: Sequence[ContainerSocket], done: Withdrawal) -> tuple[set[bytes], set[bytes]]:
    """Close them; the cookies of those for which it hung, and of those for which it failed."""
    outcome = helper_process.run_each(close, to_close, keep_running=True)
    done.helper_pid = outcome.helper_pid or done.helper_pid
    done.closed += [sock for index, sock in enumerate(to_close) if outcome.results.get(index)]
    cookies = [sock.listed.identity.cookie for sock in to_close]
    hung = {cookie for index, cookie in enumerate(cookies) if index not in outcome.results}
    return hung, {cookie for index, cookie in enumerate(cookies) if outcome.results.get(index) is False}


def close(sock: ContainerSocket) -> bool:
    """Take a socket out of use: a listener stops listening, a connection is reset, a UDP socket receives no more.

    False if that failed, also because it is gone already. May never return.
    """
    if sock.listed.is_mptcp:
        return _shut_down(sock) or _destroy(sock)
    if sock.listed.protocol == "tcp":
        return _destroy(sock) or _shut_down(sock)
    was_shut_down = _shut_down(sock)
    _destroy(sock)  # before the next: it unties a socket from its interface
    _take_from_port(sock)
    return was_shut_down


def _destroy(sock: ContainerSocket) -> bool:
    if not sockets.can_destroy():
        return False
    try:
        with netns.entered(sock.namespace):
            sockets.destroy(sock.listed)
    except OSError:
        return False
    return True


def _take_from_port(sock: ContainerSocket) -> None:
    """Have the kernel choose it for no datagram any more, where it shares its port with the endpoint's next sockets."""
    for place in sock.places:
        with socket_holders.copied(place, sock.listed.inode) as copy:
            if copy is not None:
                sockets.tie_to_no_interface(copy)
                return


def _shut_down(sock: ContainerSocket) -> bool:
    """Through a copy of the descriptor of a process that has it."""
    for place in sock.places:
        with socket_holders.copied(place, sock.listed.inode) as copy:
            if copy is not None:
                if sock.listed.protocol == "udp":
                    sockets.drop_incoming(copy)
                sockets.shut_down(copy)
                return True
    return False
