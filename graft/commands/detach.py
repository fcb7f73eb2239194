"""`graft detach`: removes a container's policy, and closes the sockets that it was granted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from graft.commands import saving, unread
from graft.commands.find import find
from graft.errors import GraftError, KernelError, NotFoundError, RefusedError
from graft.saved.model import SavedAttachment, SavedState, Target
from graft.saved.store import BadFile, Store
from graft.splice import client as splice
from graft.state import inventory, members
from graft.state.installation import Installation
from graft.state.records import Container
from graft.state.withdrawal import Withdrawal, withdraw


@dataclass(frozen=True, slots=True)
class Detached:
    """What `detach` did: the container, and what was done to its sockets. ``unanswered``: what is wrong with graftd, if
    that served the container and does not say that it has stopped. ``unread`` as in `NotWaited`.
    """

    container: Container
    withdrawal: Withdrawal
    unanswered: str = ""
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NotWaited:
    """One that was saved and not attached, and is not waited for any more. ``unread``: a line for each file that may be
    what is saved of it by another name, and cannot be read.
    """

    target: Target
    unread: tuple[str, ...] = ()


def detach(graft: Installation, text: str, keep_connections: bool = False, save: bool = False) -> Detached | NotWaited:
    """Remove a container's policy: no rule is in force from the next call on, and what it was granted is closed.

    Its listeners stop listening; its connections through endpoints are reset, unless ``keep_connections``. ``save``:
    it is not attached again; without, `graft up` attaches it after the next boot, if it is saved. Where the container
    is not there and only waited for, that ends, also if what is saved cannot be read. Raises NotFoundError.
    """
    graft.reap()
    if (waiting := _end_waiting(graft, text, save)) is not None:
        return waiting
    try:
        container = find(graft, text)
    except NotFoundError:
        if (waiting := _end_unread(graft, text, save)) is not None:
            return waiting
        raise
    return take_away(graft, container, keep_connections, saving.removed(graft.settings, container, save))


def _end_waiting(graft: Installation, text: str, save: bool) -> NotWaited | None:
    """End the waiting of the one that ``text`` names; None where none waits. Looked for again under the lock: who
    restores has that when it attaches one, which does not wait any more then.
    """
    try:
        if _find_waiting(graft, text) is None:
            return None
    except (KernelError, RefusedError):
        if save:
            raise
        return None  # nothing can be read: it may be attached all the same
    store = Store(graft.settings)
    with store.locked(saves=save):
        state, bad = store.read()
        waiting = _find_waiting(graft, text, state)
        return None if waiting is None else _forgotten(store, waiting.target, bad, save)


def _find_waiting(graft: Installation, text: str, state: SavedState | None = None) -> SavedAttachment | None:
    return None if saving.is_attached(graft, text) else saving.find_waiting(graft, text, state)


def _end_unread(graft: Installation, text: str, save: bool) -> NotWaited | None:
    """The same of one whose file cannot be read, where ``text`` names none that is attached: else the file would go,
    and the rules of the container stay.
    """
    store = Store(graft.settings)
    if not store.exists:
        return None
    with store.locked(saves=save):
        bad = store.read()[1]
        target = unread.named(bad, text)
        attached = {name for one in graft.containers.listing() for name in saving.names_of(one)}
        return None if target is None or target in attached else _forgotten(store, target, bad, save)


def _forgotten(store: Store, target: Target, bad: Sequence[BadFile], save: bool) -> NotWaited:
    saving.forget(store, target, save)
    return NotWaited(target, tuple(unread.beside(store, bad, [target], save)))


def take_away(
    graft: Installation,
    container: Container,
    keep_connections: bool = False,
    noted: AbstractContextManager[Sequence[str]] | None = None,
) -> Detached:
    """Remove the policy of an attached container, as `detach` does. ``noted`` has the change in its block, and gives
    what is ``unread``.
    """
    with inventory.host_stack(graft) as stack:  # removing the container may remove endpoints
        with (
            members.pinned(container.cgroup_path) as reachable,  # may take a while: before any lock
            noted or nullcontext(()) as unread_too,
            graft.transaction() as change,
        ):
            change.containers.remove(container, reachable)
        unanswered = stop_serving(graft, container) if container.is_relayed else ""
        return Detached(container, withdraw(graft, container, stack, keep_connections), unanswered, tuple(unread_too))


def stop_serving(graft: Installation, container: Container) -> str:
    """Gives what is wrong, if graftd does not do it: the rules are gone, and the sockets are closed all the same."""
    try:
        splice.detach(graft, container)
    except GraftError as error:
        return error.message
    return ""
