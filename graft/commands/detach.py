"""`graft detach`: a container leaves its policy, and what it was granted ends."""

from __future__ import annotations

from dataclasses import dataclass

from graft.commands.find import find
from graft.model.transport import Transport
from graft.splice import client as splice
from graft.state import inventory
from graft.state.installation import Installation
from graft.state.records import Container
from graft.state.withdrawal import Withdrawn, withdraw


@dataclass(frozen=True, slots=True)
class Detached:
    """What `detach` did: the container, and what was done to its sockets."""

    container: Container
    sockets: Withdrawn


def detach(graft: Installation, text: str, keep_connections: bool = False) -> Detached:
    """Take a container's policy away: no rule holds from the next call on, and what it was granted ends.

    Its listeners stop listening, and its connections through endpoints end, unless ``keep_connections``.
    Raises NotFoundError.
    """
    graft.reap()
    container = find(graft, text)
    with inventory.host_stack(graft) as stack:  # some endpoints may go with the container
        with graft.transaction() as change:
            change.containers.remove(container)
        if container.transport is Transport.SPLICE:
            splice.detach(graft, container)
        return Detached(container, withdraw(graft.settings, container, stack, keep_connections))
