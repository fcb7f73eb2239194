"""`graft policy apply`: replaces the policy of attached containers."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from graft.commands import saving
from graft.commands.find import find
from graft.errors import GraftError, NotFoundError, UnfinishedError
from graft.model.transport import Transport
from graft.policy.model import Policy, PolicyError
from graft.policy.validator import check_splice, needs_unix_relay
from graft.saved.model import SavedAttachment
from graft.splice import client as splice
from graft.state import members
from graft.state.containers import check_transport
from graft.state.installation import Installation
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class Applied:
    """Containers with a new policy: those that are attached, and those that are saved and wait. ``unserved``: those of
    the first that graftd does not serve by it yet, each with the reason.
    """

    containers: list[Container]
    waiting: list[SavedAttachment]
    unserved: list[str]


def apply(graft: Installation, policy: Policy, text: str | None = None, save: bool = False) -> Applied:
    """Replace the policy of the container ``text``, or of every container whose policy has the same name.

    ``save``: for the next boot too, and of those that wait. Raises NotFoundError if there is none, PolicyError,
    RefusedError, ConflictError, KernelError, and changes nothing then; UnfinishedError if one of them does not get it.
    """
    graft.reap()
    waiting = saving.find_each_waiting(graft, policy.name, text) if save else []
    if text is None:
        chosen = [one for one in graft.containers.listing() if one.policy == policy.name]
    else:
        chosen = [] if waiting else [find(graft, text)]
    if not chosen and not waiting:
        raise NotFoundError(
            f"no container has a policy named {policy.name!r}", "graft ps lists them; --cgroup chooses one"
        )
    _check_each(graft, chosen, policy)
    changed, failed = _replace_each(graft, chosen, policy, save)
    for one in waiting:
        saving.replace_waiting(graft.settings, one, policy)
    unserved = [update_relay(graft, before, container) for before, container in changed]
    if failed:
        done = ", ".join(container.name for _, container in changed)
        raise UnfinishedError(f"policy {policy.name}: {'; '.join(failed)}" + (f"; it is that of {done}" * bool(done)))
    return Applied([container for _, container in changed], waiting, [one for one in unserved if one])


def _check_each(graft: Installation, chosen: Sequence[Container], policy: Policy) -> None:
    """Raises RefusedError and PolicyError if one of the containers cannot have the policy: none gets it then."""
    compiled = graft.compile(policy)
    for container in chosen:
        if container.transport is Transport.SPLICE:
            refuse_in_splice(policy)
        check_transport(container.transport, container.name, compiled)


def _replace_each(
    graft: Installation, chosen: Sequence[Container], policy: Policy, save: bool
) -> tuple[list[tuple[Container, Container]], list[str]]:
    """Replace the policy of each, as it was and as it is; and a line for each where that failed. One that has ended
    meanwhile is left out: the others have lost an endpoint that is declared anew, and get the new one.

    Raises GraftError where nothing was changed at all.
    """
    changed: list[tuple[Container, Container]] = []
    failed: list[str] = []
    together = {container.id for container in chosen}
    for container in chosen:
        try:
            with saving.policy_of(graft.settings, container, policy, save):
                changed.append((container, replace_policy(graft, container, policy, together=together)))
        except NotFoundError as error:
            if len(chosen) == 1:
                raise
            if graft.maps.containers.get(ctypes.c_uint32(container.id)) is not None:
                failed.append(f"{container.name}: {error.message}")
        except (GraftError, OSError) as error:
            if not changed:
                raise
            failed.append(f"{container.name}: {error}")
    return changed, failed


def refuse_in_splice(policy: Policy) -> None:
    """Raises PolicyError for a policy that transport splice cannot serve."""
    problems = check_splice(policy)
    if problems:
        raise PolicyError(policy.name, problems)


def update_relay(graft: Installation, before: Container, container: Container) -> str:
    """Have graftd serve a container by its new policy, which is in force, or not any more. Gives what is wrong, where
    it does not do so yet. A container may delay it: not to be called under a lock.
    """
    try:
        if container.is_relayed:
            splice.attach(graft.settings, container)
        elif before.is_relayed:
            splice.detach(graft, container)
    except GraftError as error:
        return f"{container.name}: {error.message}"
    return ""


def check_served(unserved: Sequence[str]) -> None:
    """Raises UnfinishedError for containers that graftd does not serve by their policies yet."""
    if unserved:
        message = f"in force, but graftd does not serve by it yet: {'; '.join(unserved)}"
        raise UnfinishedError(message, "it does when it gets to it; graft ps tells")


def replace_policy(
    graft: Installation,
    container: Container,
    policy: Policy,
    name: str | None = None,
    relay: str | None = None,
    together: Collection[int] = (),
) -> Container:
    """Replace a container's policy in the maps; graftd is to be told afterwards. Raises what `apply` raises.

    ``name``, ``relay``: the new ones, None to keep them. ``together``: containers that get the same policy with it.
    """
    if container.transport is Transport.SPLICE:
        refuse_in_splice(policy)
    compiled = graft.compile(policy)
    attaches = not container.is_relayed and needs_unix_relay(compiled.policy, compiled.endpoints)
    reach = members.within_reach(container.cgroup_path) if attaches else contextlib.nullcontext()
    with reach, graft.transaction() as change:
        return change.containers.apply(container, compiled, name, relay, together)
