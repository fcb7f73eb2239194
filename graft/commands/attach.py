"""`graft attach`: puts a running container under a policy.

Finds the container, observes what decides its transport (transport_choice.py), and attaches it or replaces its policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from graft.commands import saving
from graft.commands.policy_apply import ensure_hooks, refuse_in_splice, replace_policy, update_relay
from graft.commands.policy_source import with_current
from graft.commands.renamed import rename_others
from graft.commands.transport_choice import Observed, TransportChoice, choose_transport
from graft.errors import ConflictError, NotFoundError, RefusedError
from graft.kernel import netns
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.policy.validator import grants_that_splice_lacks, needs_unix_relay
from graft.splice import client as splice
from graft.state import inventory, members, thread_namespaces
from graft.state.engines import FoundContainer, resolve
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket, Existing
from graft.state.members import Members
from graft.state.nesting import refuse_below
from graft.state.records import Container

Made = tuple[Container, tuple[ContainerSocket, ...], bool]
"""A container, those sockets of before that are cut off, and whether graftd serves it already."""
NO_SOCKETS = Existing(())
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Attached:
    """What `attach` found and did. ``existing`` are the sockets from before the policy (None: could not be listed), and
    ``cut_off`` those of them that receive nothing any more, because no process lends them. ``late`` are sockets that
    the container made while it was attached, before its hooks saw them (None: could not be listed).

    ``without_effect`` are the fields of rules for UDP, ``without_supervisor`` those of rules for unix paths, that this
    transport does not support. ``saved``: it is attached again when it starts again. ``is_served``: graftd serves it,
    where it has to; ``unserved``: what is wrong, if it does not yet. ``unread``: a line for each file that may be what
    is saved of it by another name, and cannot be read.
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
    saved: bool = False
    is_served: bool = True
    unserved: str = ""
    unread: tuple[str, ...] = ()


def attach(
    graft: Installation,
    text: str,
    policy: Policy,
    wanted: Transport | None = None,
    relay: str | None = None,
    save: bool = False,
) -> Attached:
    """Put the container that ``text`` names under ``policy``, or replace its policy.

    ``relay`` (splice, kernel) is how transport splice moves bytes; None: as before, or splice. ``save``: for the next
    boot too. Raises NotFoundError, ConflictError, RefusedError, PolicyError, KernelError; nothing is changed then,
    unless the error is about the policy's file: that is looked at again when it is attached (`with_current`).
    """
    return with_current(graft, policy, lambda current: _attach_once(graft, text, current, wanted, relay, save))


def _attach_once(
    graft: Installation, text: str, policy: Policy, wanted: Transport | None, relay: str | None, save: bool
) -> Attached:
    target = _started_by_graft(graft, text) if _is_attached_name(graft, text) else resolve(text)
    for _ in range(_TRIES):
        seen = look_at(graft, target, wanted, relay)
        seen.ensure_daemon(graft, policy)
        with seen.within_reach(), saving.alone(graft.settings, save) as is_alone:  # nobody restores it meanwhile
            saving.remove_left(graft, is_alone)
            if seen.is_current(graft):
                made = saving.of_attached(target, policy, seen.choice.transport, wanted, relay)
                with saving.attachment(graft.settings, made, save) as unread:
                    done = attach_seen(graft, seen, policy, relay)
                done = replace(done, saved=save and made is not None, unread=tuple(unread))
                break
    else:
        raise ConflictError("cgroup: others attach and detach it at the same time", "try again")
    rename_others(graft, target)
    if seen.attached is not None or not done.is_served:
        done = replace(done, unserved=update_relay(graft, seen.attached or done.container, done.container))
    if seen.attached is not None:
        return done
    return replace(done, late=_made_meanwhile(graft, done.container, seen.inside, seen.existing))


@dataclass(frozen=True, slots=True)
class Seen:
    """A container as it was when it was looked at, which takes as long as it likes to have it take: under no lock.

    ``record`` is there if it was attached then; ``attached``, if its cgroup was there too. ``over``: containers below
    its cgroup that do not keep it from being attached, and are taken away after that.
    """

    target: FoundContainer
    record: Container | None
    attached: Container | None
    inside: Members
    observed: Observed
    choice: TransportChoice
    existing: Existing | None
    ruleset: int = 0
    over: tuple[Container, ...] = ()

    def is_current(self, graft: Installation) -> bool:
        """Whether nobody has attached it since, detached it, or replaced its policy."""
        now = _record_at(graft, self.target.cgroup)
        return now == self.record and (0 if now is None else graft.ruleset_of(now)) == self.ruleset

    def ensure_daemon(self, graft: Installation, policy: Policy) -> None:
        """Start graftd, if this container is to be attached with ``policy`` and needs it. Before the lock is taken:
        somebody may hold what a process looks up that starts. Raises PolicyError and what else `attach` raises.
        """
        if self.attached is not None:
            return
        compiled = graft.compile(policy)
        if self.choice.transport is Transport.SPLICE:
            refuse_in_splice(policy)
        elif not needs_unix_relay(compiled.policy, compiled.endpoints):
            return
        splice.ensure_daemon(graft.settings)

    def within_reach(self) -> AbstractContextManager[None]:
        """For the block that attaches it (graft/state/members.py). Before the lock is taken: this takes time too."""
        return nullcontext() if self.attached is not None else members.within_reach(self.target.cgroup)


def look_at(
    graft: Installation,
    target: FoundContainer,
    wanted: Transport | None = None,
    relay: str | None = None,
    choose: Callable[[Observed, Transport | None], TransportChoice] = choose_transport,
    over: Sequence[Container] = (),
) -> Seen:
    """What `attach_seen` has to know of a container. Raises NotFoundError, RefusedError, KernelError."""
    graft.reap()
    record = _record_at(graft, target.cgroup)
    ruleset = 0 if record is None else graft.ruleset_of(record)
    attached = graft.containers.at(target.cgroup)
    if attached is not None:
        ensure_hooks(graft, attached)
    inside = members.inside(target.cgroup)
    observed = observe(graft.settings, target.cgroup, inside.pids, attached)
    choice = choose(observed, wanted)
    if relay is not None:
        _check_relay(graft.settings, choice, relay)
    existing: Existing | None = NO_SOCKETS
    if attached is None:
        refuse_below(target.cgroup, [one.cgroup_path for one in over])
        existing = inventory.host_sockets_of(graft.settings, inside)
    return Seen(target, record, attached, inside, observed, choice, existing, ruleset, tuple(over))


def _record_at(graft: Installation, path: Path) -> Container | None:
    return next((one for one in graft.containers.listing() if one.cgroup == str(path)), None)


def attach_seen(
    graft: Installation,
    seen: Seen,
    policy: Policy,
    relay: str | None = None,
) -> Attached:
    """Attach a container that was looked at and `is_current`, under the lock on what is saved, if anything is or is to
    be, and `within_reach`. Saves nothing.

    Of one that was attached before, graftd is to be told afterwards (`update_relay`).
    """
    target, choice = seen.target, seen.choice
    cut_off: tuple[ContainerSocket, ...] = ()
    is_served = True
    if seen.attached is not None:
        container = _replace_policy(graft, target, seen.attached, choice, policy, relay)
    elif choice.transport is Transport.SPLICE:
        container, cut_off, is_served = _attach_splice(graft, seen, policy, relay or "splice")
    else:
        container, cut_off, is_served = _attach_direct(graft, seen, policy)
    return Attached(
        target,
        seen.observed,
        choice,
        container,
        seen.attached is not None,
        seen.existing,
        cut_off,
        without_effect=_without_effect(graft, choice, policy),
        without_supervisor=_without_supervisor(choice, policy),
        is_served=is_served,
    )


def _made_meanwhile(
    graft: Installation, container: Container, before: Members, existing: Existing | None
) -> tuple[ContainerSocket, ...] | None:
    """What the container has made since its sockets were listed: a search of its processes takes as long as their
    number of descriptors has it take.
    """
    if existing is None:
        return None
    now = members.of_each([container.cgroup_path]).get(container.cgroup_path, before)
    inside = Members(now.pids, now.cgroups | before.cgroups, now.are_all)
    return inventory.made_since(graft.settings, container.id, inside, existing)


def observe(settings: Settings, path: Path, pids: Sequence[int], attached: Container | None) -> Observed:
    """What decides the transport of the container at ``path``, which had these processes. Raises KernelError."""
    host = netns.inode(settings.host_netns)
    namespaces = thread_namespaces.of_container(path, pids, host)
    return Observed(host, namespaces, None if attached is None else attached.transport)


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
    if target.engine in ("docker", "podman", "systemd"):  # from here on it is known by that name
        attached = replace(attached, name=target.name, engine=target.engine)
    return replace_policy(graft, attached, policy, relay=relay)


def _attach_direct(graft: Installation, seen: Seen, policy: Policy) -> Made:
    """Attach the hooks, for transport direct. Returns the container, and those sockets of before that are cut off."""
    container, cut_off = _create(graft, seen, policy, netns.cookie(graft.settings.host_netns))
    return container, cut_off, splice.begin_to_serve(graft, container)


def _create(
    graft: Installation, seen: Seen, policy: Policy, cookie: int, relay: str = "splice"
) -> tuple[Container, tuple[ContainerSocket, ...]]:
    """Attach the hooks. What the container has in the host's namespace is kept if it was there before."""
    target, existing = seen.target, seen.existing or NO_SOCKETS
    cut_off: list[ContainerSocket] = []
    compiled = graft.compile(policy)
    with graft.transaction() as change:
        container = change.containers.create(
            compiled,
            target.cgroup,
            cookie,
            seen.choice.transport,
            name=target.name,
            engine=target.engine,
            relay=relay,
            prepare=lambda number: cut_off.extend(inventory.keep_reachable(graft.settings, number, existing.sockets)),
            over={one.id for one in seen.over},
        )
    return container, tuple(cut_off)


def _attach_splice(graft: Installation, seen: Seen, policy: Policy, relay: str) -> Made:
    """Attach the hooks of transport splice, and have graftd relay for it. Undone if that fails.

    What it has in the host's namespace is as with transport direct: judged, and kept if it was there before.
    """
    refuse_in_splice(policy)
    pid = next(iter(seen.inside.pids), seen.target.pid)
    try:
        cookie = netns.cookie(pid)
    except OSError:
        raise NotFoundError(f"cgroup: the processes of {seen.target.name} have ended") from None
    container, cut_off = _create(graft, seen, policy, cookie, relay)
    return container, cut_off, splice.begin_to_serve(graft, container, pid)


def _without_effect(graft: Installation, choice: TransportChoice, policy: Policy) -> tuple[str, ...]:
    if choice.transport is Transport.DIRECT:
        return ()
    return grants_that_splice_lacks(policy, policy.resolve(graft.endpoints.by_name()))


def _without_supervisor(choice: TransportChoice, policy: Policy) -> tuple[str, ...]:
    """Fields of the rules for unix paths, which only a supervisor can bind."""
    return () if choice.transport is Transport.SWAP else tuple(rule.field for rule in policy.unix_ingress)
