"""`graft detach`: removes a container's policy, and closes the sockets that it was granted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from graft.commands import saving
from graft.commands.find import find
from graft.errors import GraftError
from graft.saved.model import SavedAttachment
from graft.saved.store import Store
from graft.splice import client as splice
from graft.state import inventory, members
from graft.state.installation import Installation
from graft.state.records import Container
from graft.state.withdrawal import Withdrawal, withdraw


@dataclass(frozen=True, slots=True)
class Detached:
    """What `detach` did: the container, and what was done to its sockets. ``unanswered``: what is wrong with graftd, if
    that served the container and does not say that it has stopped.
    """

    container: Container
    withdrawal: Withdrawal
    unanswered: str = ""


def detach(
    graft: Installation, text: str, keep_connections: bool = False, save: bool = False
) -> Detached | SavedAttachment:
    """Remove a container's policy: no rule is in force from the next call on, and what it was granted is closed.

    Its listeners stop listening; its connections through endpoints are reset, unless ``keep_connections``. ``save``:
    it is not attached again; without, `graft up` attaches it after the next boot, if it is saved. Where the container
    is not there and only waited for, that ends, and the result is what was saved. Raises NotFoundError.
    """
    graft.reap()
    if (waiting := _end_waiting(graft, text, save)) is not None:
        return waiting
    container = find(graft, text)
    return take_away(graft, container, keep_connections, saving.removed(graft.settings, container, save))


def _end_waiting(graft: Installation, text: str, save: bool) -> SavedAttachment | None:
    """End the waiting of the one that ``text`` names, and give it; None where none waits. Looked for again under the
    lock: who restores has that when it attaches one, which does not wait any more then.
    """
    if _find_waiting(graft, text) is None:
        return None
    store = Store(graft.settings)
    with store.locked(saves=save):
        waiting = _find_waiting(graft, text)
        if waiting is not None:
            saving.forget(store, waiting, save)
    return waiting


def _find_waiting(graft: Installation, text: str) -> SavedAttachment | None:
    return None if saving.is_attached(graft, text) else saving.find_waiting(graft, text)


def take_away(
    graft: Installation,
    container: Container,
    keep_connections: bool = False,
    noted: AbstractContextManager[None] | None = None,
) -> Detached:
    """Remove the policy of an attached container, as `detach` does. ``noted`` has the change in its block."""
    with inventory.host_stack(graft) as stack:  # removing the container may remove endpoints
        with (
            members.pinned(container.cgroup_path) as reachable,  # may take a while: before any lock
            noted or nullcontext(),
            graft.transaction() as change,
        ):
            change.containers.remove(container, reachable)
        unanswered = stop_serving(graft, container) if container.is_relayed else ""
        return Detached(container, withdraw(graft, container, stack, keep_connections), unanswered)


def stop_serving(graft: Installation, container: Container) -> str:
    """Gives what is wrong, if graftd does not do it: the rules are gone, and the sockets are closed all the same."""
    try:
        splice.detach(graft, container)
    except GraftError as error:
        return error.message
    return ""
