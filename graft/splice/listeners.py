"""What a container listens on now. In steps: it may have any number of cgroups and listeners."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from graft.errors import NotFoundError
from graft.kernel import cgroup
from graft.kernel.sockdiag import Diagnostics, ListeningSocket
from graft.splice.jobs import Stepwise
from graft.splice.publication import PublicationPlan

_STEP_ITEMS = 16


def cgroup_ids(path: Path, root: int) -> Stepwise[set[int]]:
    """The ids of a cgroup and of all below it. (The kernel lists a socket with the id of the cgroup it was made in.)

    Raises NotFoundError where the cgroup at ``path`` has another id than ``root`` (0: any).
    """
    found: set[int] = set()
    for folder in cgroup.tree(path):
        try:
            number = cgroup.cgroup_id(folder)
        except OSError:  # removed meanwhile
            continue
        if not found and root not in (0, number):
            break
        found.add(number)
        if len(found) % _STEP_ITEMS == 0:
            yield
    if not found:
        raise NotFoundError(f"the cgroup {path} is gone")
    return found


def collect_listeners(
    diagnostics: Diagnostics,
    plan: PublicationPlan,
    skip_ports: Collection[int],
    storage: int | None = None,
    read: Callable[[ListeningSocket], ListeningSocket] = lambda listener: listener,
) -> Stepwise[None]:
    """Add every listener to ``plan``, but those on ``skip_ports``; each as ``read`` returns it, which gets its value in
    the socket storage map ``storage``. Raises OSError.
    """
    for piece in diagnostics.listeners(storage):
        yield
        for number, listener in enumerate(piece, 1):
            if listener.port not in skip_ports:
                plan.add(read(listener))
            if number % _STEP_ITEMS == 0:
                yield


def collect_datagram_sockets(diagnostics: Diagnostics, plan: PublicationPlan) -> Stepwise[None]:
    """Add every UDP socket of the namespace to ``plan``. Raises OSError."""
    for piece in diagnostics.datagram_sockets():
        yield
        for number, one in enumerate(piece, 1):
            plan.add_datagram_socket(one)
            if number % _STEP_ITEMS == 0:
                yield
