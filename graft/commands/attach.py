"""`graft attach`: puts a running container under a policy.

Finds the container, observes what decides its transport (transport_choice.py), and attaches it or replaces its policy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from graft.commands.policy_apply import refuse_in_splice, replace_policy, update_relay
from graft.commands.transport_choice import Observed, TransportChoice, choose_transport
from graft.errors import NotFoundError, RefusedError
from graft.kernel import netns
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.policy.validator import grants_that_splice_lacks
from graft.splice import client as splice
from graft.state import inventory, members
from graft.state.containers import refuse_below
from graft.state.engines import FoundContainer, resolve
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket, Existing
from graft.state.members import Members
from graft.state.records import Container

NO_SOCKETS = Existing(())


@dataclass(frozen=True, slots=True)
class Attached:
    """What `attach` found and did. ``existing`` are the sockets from before the policy (None: could not be listed), and
    ``cut_off`` those of them that receive nothing any more, because no process lends them. ``late`` are sockets that
    the container made while it was attached, before its hooks saw them (None: could not be listed).

    ``without_effect`` are the fields of rules for UDP, ``without_supervisor`` those of rules for unix paths, that this
    transport does not support.
    """

    target: FoundContainer
    observed: Observed
    choice: TransportChoice
    container: Container
    replaced: bool
    existing: Existing | None = NO_SOCKETS
    cut_off: tuple[ContainerSocket, ...] = ()
    late: tuple[ContainerSocket, ...] | None = ()
    without_effect: tuple[str, ...] = ()
    without_supervisor: tuple[str, ...] = ()


def attach(
    graft: Installation, text: str, policy: Policy, wanted: Transport | None = None, relay: str | None = None
) -> Attached:
    """Put the container that ``text`` names under ``policy``, or replace its policy.

    ``relay`` (splice, kernel) is how transport splice moves bytes; None: as before, or splice.
    Raises NotFoundError, ConflictError, RefusedError, PolicyError, KernelError; nothing is changed then.
    """
    target = _started_by_graft(graft, text) if _is_attached_name(graft, text) else resolve(text)
    graft.reap()
    attached = graft.containers.at(target.cgroup)
    inside = members.inside(target.cgroup)
    observed = observe(graft.settings, inside.pids, attached)
    choice = choose_transport(observed, wanted)
    if relay is not None:
        _check_relay(graft.settings, choice, relay)
    existing: Existing | None = NO_SOCKETS
    cut_off: tuple[ContainerSocket, ...] = ()
    late: tuple[ContainerSocket, ...] | None = ()
    if attached is not None:
        container = _replace_policy(graft, target, attached, choice, policy, relay)
    elif choice.transport is Transport.SPLICE:
        container = _attach_splice(graft, target, inside.pids, policy, relay or "splice")
    else:
        existing = inventory.host_sockets_of(graft.settings, inside)
        container, cut_off = _attach_direct(graft, target, existing or NO_SOCKETS, policy, choice)
        late = _made_meanwhile(graft, container, inside, existing)
    without_effect = _without_effect(graft, choice, policy)
    unix = _without_supervisor(choice, policy)
    replaced = attached is not None
    return Attached(target, observed, choice, container, replaced, existing, cut_off, late, without_effect, unix)


def _made_meanwhile(
    graft: Installation, container: Container, before: Members, existing: Existing | None
) -> tuple[ContainerSocket, ...] | None:
    """What the container has made since its sockets were listed: a search of its processes takes as long as their
    number of descriptors has it take.
    """
    if existing is None:
        return None
    now = members.of_each([container.cgroup_path]).get(container.cgroup_path, before)
    inside = Members(now.pids, now.cgroups | before.cgroups)
    return inventory.made_since(graft.settings, container.id, inside, existing)


def observe(settings: Settings, pids: Sequence[int], attached: Container | None) -> Observed:
    """What decides the transport of the container with these processes."""
    namespaces = netns.inodes_of(pids)
    transport = None if attached is None else attached.transport
    return Observed(os.stat(settings.host_netns).st_ino, dict(namespaces), transport)


def _is_attached_name(graft: Installation, text: str) -> bool:
    named = [one for one in graft.containers.listing() if text == one.name and one.engine == "graft"]
    return len(members.gone(named)) < len(named)


def _started_by_graft(graft: Installation, text: str) -> FoundContainer:
    """A container that Graft started, by the name that `graft ps` shows."""
    container = graft.containers.find(text)
    return FoundContainer(container.cgroup_path, container.engine, container.name, str(container.id))


def _check_relay(settings: Settings, choice: TransportChoice, relay: str) -> None:
    if choice.transport is not Transport.SPLICE:
        raise RefusedError(f"--relay: transport {choice.transport} has no relay: {choice.why}", "leave --relay out")
    splice.check_relay(settings, relay)


def _replace_policy(
    graft: Installation,
    target: FoundContainer,
    attached: Container,
    choice: TransportChoice,
    policy: Policy,
    relay: str | None,
) -> Container:
    """Replace the policy of a container that is attached."""
    if attached.transport is not choice.transport:
        raise RefusedError(
            f"cgroup: it is attached with transport {attached.transport}, but now needs {choice.transport}",
            "detach it first: graft detach",
        )
    name = target.name if target.engine in ("docker", "podman", "systemd") else None
    changed = replace_policy(graft, attached, policy, name, relay)
    update_relay(graft, attached, changed)
    return changed


def _attach_direct(
    graft: Installation, target: FoundContainer, existing: Existing, policy: Policy, choice: TransportChoice
) -> tuple[Container, tuple[ContainerSocket, ...]]:
    """Attach the hooks, for transport direct. Returns the container, and those sockets of before that are cut off."""
    settings = graft.settings
    cut_off: list[ContainerSocket] = []
    compiled = graft.compile(policy)
    refuse_below(target.cgroup)
    with members.within_reach(target.cgroup), graft.transaction() as change:
        container = change.containers.create(
            compiled,
            target.cgroup,
            netns.cookie(settings.host_netns),
            choice.transport,
            name=target.name,
            engine=target.engine,
            prepare=lambda number: cut_off.extend(inventory.keep_reachable(settings, number, existing.sockets)),
        )
    splice.serve(graft, container)
    return container, tuple(cut_off)


def _attach_splice(
    graft: Installation, target: FoundContainer, pids: Sequence[int], policy: Policy, relay: str
) -> Container:
    """Attach the hooks of transport splice, and have graftd relay for it. Undone if that fails."""
    refuse_in_splice(policy)
    splice.ensure_daemon(graft.settings)
    pid = next(iter(pids), target.pid)
    try:
        cookie = netns.cookie(pid)
    except OSError:
        raise NotFoundError(f"cgroup: the processes of {target.name} have ended") from None
    compiled = graft.compile(policy)
    refuse_below(target.cgroup)
    with members.within_reach(target.cgroup), graft.transaction() as change:
        container = change.containers.create(
            compiled, target.cgroup, cookie, Transport.SPLICE, name=target.name, engine=target.engine, relay=relay
        )
    splice.serve(graft, container, pid)
    return container


def _without_effect(graft: Installation, choice: TransportChoice, policy: Policy) -> tuple[str, ...]:
    if choice.transport is Transport.DIRECT:
        return ()
    return grants_that_splice_lacks(policy, policy.resolve(graft.endpoints.by_name()))


def _without_supervisor(choice: TransportChoice, policy: Policy) -> tuple[str, ...]:
    """Fields of the rules for unix paths, which only a supervisor can bind."""
    return () if choice.transport is Transport.SWAP else tuple(rule.field for rule in policy.unix_ingress)
