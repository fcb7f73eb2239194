"""`graft policy apply`: replaces the policy of attached containers."""

from __future__ import annotations

import contextlib

from graft.commands.find import find
from graft.errors import NotFoundError
from graft.model.transport import Transport
from graft.policy.model import Policy, PolicyError
from graft.policy.validator import check_splice, needs_unix_relay
from graft.splice import client as splice
from graft.state import members
from graft.state.installation import Installation
from graft.state.records import Container


def apply(graft: Installation, policy: Policy, text: str | None = None) -> list[Container]:
    """Replace the policy of the container ``text``, or of every container whose policy has the same name.

    Raises NotFoundError if there is none, PolicyError, ConflictError.
    """
    graft.reap()
    if text is not None:
        chosen = [find(graft, text)]
    else:
        chosen = [one for one in graft.containers.listing() if one.policy == policy.name]
    if not chosen:
        raise NotFoundError(
            f"no container has a policy named {policy.name!r}", "graft ps lists them; --cgroup chooses one"
        )
    changed = [replace_policy(graft, container, policy) for container in chosen]
    for before, container in zip(chosen, changed, strict=True):
        update_relay(graft, before, container)
    return changed


def refuse_in_splice(policy: Policy) -> None:
    """Raises PolicyError for a policy that transport splice cannot serve."""
    problems = check_splice(policy)
    if problems:
        raise PolicyError(policy.name, problems)


def update_relay(graft: Installation, before: Container, container: Container) -> None:
    """Have graftd serve a container by its new policy, or not any more. Raises GraftError."""
    if container.is_relayed:
        splice.attach(graft.settings, container)
    elif before.is_relayed:
        splice.detach(graft, container)


def replace_policy(
    graft: Installation, container: Container, policy: Policy, name: str | None = None, relay: str | None = None
) -> Container:
    """Replace a container's policy in the maps; graftd is to be told afterwards. Raises what `apply` raises.

    ``name``, ``relay``: the new ones, None to keep them.
    """
    if container.transport is Transport.SPLICE:
        refuse_in_splice(policy)
    compiled = graft.compile(policy)
    attaches = not container.is_relayed and needs_unix_relay(compiled.policy, compiled.endpoints)
    reach = members.within_reach(container.cgroup_path) if attaches else contextlib.nullcontext()
    with reach, graft.transaction() as change:
        return change.containers.apply(container, compiled, name, relay)
