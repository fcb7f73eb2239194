"""What the operator has saved for a container that asks for a policy: that outranks it.

It outranks what its image may ask for, and an annotation of the operator's too: that is of when the container was made
and stays so, and what is saved was given to it later, by its name.

A container of that id, or at that cgroup, starts under what is saved, before its program runs. One below a cgroup that
is saved does not start, as none does below one that is attached, unless the operator has chosen what it asks for. A
container that was made again has another id: its engine tells its name when it runs, and the saved policy takes the
place of what it asked for then (graft/commands/restore.py).

Where a file of what is saved cannot be read, and no other one is this container's, it may be: it does not start.

What is saved is loaded where there is any: a shim, and `graft listen`, stay for long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graft.errors import KernelError, RefusedError
from graft.kernel import cgroup
from graft.model.transport import Transport
from graft.oci.plan import Plan
from graft.policy.model import Origin

if TYPE_CHECKING:
    from graft.saved.model import SavedAttachment
    from graft.saved.store import Store


@contextlib.contextmanager
def saved_for(plan: Plan, path: Path) -> Iterator[SavedAttachment | None]:
    """What is saved for the container of ``plan`` at the cgroup ``path``; None where nothing is. For the block that
    attaches it: with the lock on what is saved, if anything is.

    Raises RefusedError where it cannot have what is saved, KernelError where that cannot be found out.
    """
    from graft.saved.store import Store

    store = Store(plan.settings)
    if not store.exists:
        yield None
        return
    with store.locked(saves=False):
        yield _find(store, plan, path)


def _find(store: Store, plan: Plan, path: Path) -> SavedAttachment | None:
    """What is saved of this container, as it is to be restored now. Raises RefusedError, KernelError."""
    from graft.saved.store import ATTACHMENTS, file_name

    top = cgroup.v2_mount()
    state, bad = store.read()
    for saved in state.attachments:
        where = saved.target.name if saved.target.kind == "cgroup" else saved.last.cgroup
        is_it = plan.id == saved.last.id or top / where == path
        is_below = where != "" and top / where in path.parents and plan.policy.origin is not Origin.OPERATOR
        if not (is_it or is_below) or store.is_paused(ATTACHMENTS, file_name(saved.target)):
            continue
        if is_below or plan.transport is not Transport.DIRECT:
            raise RefusedError(
                f"the container asks for a policy, and the operator's for {saved.target.text} is saved",
                f"start it so that it asks for none, or: graft detach --cgroup {saved.target.text}",
            )
        return store.wanted(saved)
    for one in bad:
        if one.path.parent.name == ATTACHMENTS and not store.is_paused(ATTACHMENTS, one.path.name):
            raise KernelError(f"{one.line}: it may be what is saved for the container", "graft up")
    return None
