"""`graft policy apply`: another policy for containers that have one."""

from __future__ import annotations

from graft.commands.find import find
from graft.errors import NotFoundError
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.splice import client as splice
from graft.state.installation import Installation
from graft.state.records import Container


def apply(graft: Installation, policy: Policy, text: str | None = None) -> list[Container]:
    """Replace the policy of the container ``text``, or of every one whose policy has the same name.

    Raises NotFoundError where there is none, PolicyError, ConflictError.
    """
    graft.reap()
    if text is not None:
        chosen = [find(graft, text)]
    else:
        chosen = [one for one in graft.containers.listing() if one.policy == policy.name]
    if not chosen:
        raise NotFoundError(f"no container has a policy of the name {policy.name!r}", "graft ps; --cgroup names one")
    changed = [_apply(graft, container, policy) for container in chosen]
    for container in changed:
        if container.transport is Transport.SPLICE:
            splice.attach(graft.settings, container)
    return changed


def _apply(graft: Installation, container: Container, policy: Policy) -> Container:
    compiled = graft.compile(policy)
    with graft.transaction() as change:
        return change.containers.apply(container, compiled)
