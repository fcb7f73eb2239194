"""Changes containers: their cgroups' hooks, their policies in the maps, and their records.

A policy is replaced in one step: its rules are written under a new ruleset number, then one update of the container's
entry switches to that number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from graft.datapath import attachments, exchanges, layout, rulesets
from graft.datapath.maps import Maps, needs_room
from graft.errors import ConflictError, NotFoundError, RefusedError
from graft.kernel import cgroup
from graft.kernel.netns import cookie
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.compiler import RuleSet
from graft.policy.limits import MAX_ASKED_ENTRIES
from graft.policy.model import Origin, Policy
from graft.policy.validator import needs_unix_relay
from graft.state import (
    begun,
    bound_sockets,
    call_times,
    detached,
    ferries,
    host_addresses,
    nesting,
    records,
    unix_sockets,
)
from graft.state.compiled_policy import CompiledPolicy, check_transport, compile_for, endpoint_names, refuse_closed
from graft.state.containers import Containers
from graft.state.endpoints import EndpointChanges
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class _Installed:
    """A policy's rules in the maps: their ruleset number, the defaults, and the endpoints that it superseded."""

    ruleset: int
    bind_default: int
    connect_default: int
    flags: int
    superseded: dict[str, int]
    unix_relay: bool
    asked: int


def _under(container: Container, policy: Policy, new: _Installed) -> Container:
    """The container with what its record says of a policy that was installed for it."""
    return replace(
        container,
        policy=policy.name,
        endpoints=endpoint_names(policy),
        unix_relay=new.unix_relay,
        asked=new.asked,
        ruleset=new.ruleset,
        origin=policy.origin.name.lower(),
    )


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What `ContainerChanges.exchange` did. The old rules stay, and are nobody's, until `complete` or `undo`.

    ``value`` is the old entry of the container in the maps.
    """

    before: Container
    after: Container
    value: layout.ContainerValue
    new: _Installed

    @property
    def ruleset(self) -> int:
        """The number of the old rules."""
        return int(self.value.ruleset)


class ContainerChanges(Containers):
    """Changes containers, under the installation's lock (graft/state/installation.py)."""

    def __init__(self, settings: Settings, maps: Maps, endpoints: EndpointChanges, new_id: Callable[[], int]) -> None:
        super().__init__(settings)
        self._maps, self._endpoints, self._new_id = maps, endpoints, new_id

    def create(
        self,
        compiled: CompiledPolicy,
        path: Path,
        netns: int,
        transport: Transport,
        pid: int = 0,
        *,
        name: str | None = None,
        engine: str = "graft",
        relay: str = "splice",
        prepare: Callable[[int], None] | None = None,
        over: Collection[int] = (),
    ) -> Container:
        """Put the cgroup at ``path`` under a policy. ``netns``: cookie of the namespace that its processes are in.

        ``over`` are containers below it, which are taken away next. ``name`` is by default the policy's. ``prepare`` is
        called with the container's id, after its rules are written and before any hook is attached. Containers that
        have ended may be in its way: `Installation.reap` comes before. The cgroup is to be kept open (`members.pinned`)
        where others may list a folder above it.

        Changes nothing if it fails, but that a container of a data plane that is gone may be judged by some of its old
        hooks and some new ones, until it is attached (PolicyError, ConflictError, KernelError; RefusedError if a cgroup
        above is attached, or one below that has a record (`refuse_below` finds the others); UnixPathError if a unix
        socket's path cannot be had).
        """
        policy = compiled.policy
        check_transport(transport, name or policy.name, compiled)
        stale = records.put_aside_at(self._settings, path)
        replaces = bool(stale) and attachments.has_programs(path)
        left = [one.id for one in begun.listing(self._settings) if one.cgroup == str(path)]
        nesting.refuse(
            self._settings, self._maps, path, [one for one in self.listing() if one.id not in over], replaces
        )
        bound_sockets.check_free(policy, compiled.endpoints)
        new = self._install(compiled, self._rulesets_of(left))
        number = self._new_id()
        detached.forget(self._settings, number)
        try:
            made = Container(
                id=number,
                name=name or policy.name,
                cgroup=str(path),
                transport=transport,
                netns=netns,
                policy=policy.name,
                endpoints=(),
                pid=pid,
                cgroup_id=cgroup.cgroup_id(path),
                engine=engine,
                relay=relay,
            )
            container = _under(made, policy, new)
            begun.note(self._settings, container)
            value = layout.ContainerValue(
                netns,
                new.ruleset,
                transport,
                new.bind_default,
                new.connect_default,
                new.flags,
                0 if transport.is_supervised else cookie(self._settings.host_netns),
            )
            with needs_room("container"):
                self._maps.containers.put(ctypes.c_uint32(number), value)
            if prepare is not None:
                prepare(number)
            attachments.attach(self._settings, path, number, splice=container.is_relayed, replaces=replaces)
            begun.finish(self._settings, number)
        except BaseException:
            # Hooks that are in the place of others stay, with what they judge by: it had a policy before.
            if not replaces or nesting.number_at(self._maps, path) != number:
                if not replaces:
                    attachments.detach(self._settings, path)
                self._endpoints.restore_superseded(new.superseded)
                self._forget_detached(number, transport)
            raise
        self._endpoints.delete_superseded(new.superseded)
        for other in left:
            self._forget(other)
        for file in stale:
            file.unlink(missing_ok=True)
        return container

    def apply(
        self,
        container: Container,
        compiled: CompiledPolicy,
        name: str | None = None,
        relay: str | None = None,
        together: Collection[int] = (),
    ) -> Container:
        """Replace a container's policy, for good: `exchange` and `complete`."""
        done = self.exchange(container, compiled, name, relay, together)
        self.complete(done)
        return done.after

    def exchange(
        self,
        container: Container,
        compiled: CompiledPolicy,
        name: str | None = None,
        relay: str | None = None,
        together: Collection[int] = (),
        kept: Collection[int] = (),
    ) -> Exchanged:
        """Replace a container's policy in one step: each call is decided by the old rules or by the new ones. To be
        followed by `complete` or `undo`.

        ``name``, ``relay``: their new values, if they change. ``together``: containers that get the same policy next,
        so that their rules do not keep an endpoint as it is that the policy declares anew. Until then what they have of
        it is refused, from `complete` on. ``kept``: old rules of other exchanges, which keep it neither. Changes
        nothing if it fails: NotFoundError if the container is not attached any more, RefusedError if its transport
        cannot serve the policy, and what `create` raises.
        """
        check_transport(container.transport, container.name, compiled)
        value = self._maps.containers.get(ctypes.c_uint32(container.id))
        if value is None:
            raise NotFoundError(f"container: {container.name!r} is not attached", "graft ps")
        old = layout.ContainerValue.from_buffer_copy(value)
        if needs_unix_relay(compiled.policy, compiled.endpoints) and not container.is_relayed:
            attachments.attach(self._settings, container.cgroup_path, container.id, splice=True, replaces=True)
        new = self._install(compiled, {old.ruleset, *kept, *self._rulesets_of(together)}, container.id)
        value.ruleset, value.flags = new.ruleset, new.flags
        value.bind_default, value.connect_default = new.bind_default, new.connect_default
        named = replace(container, name=name or container.name, relay=relay or container.relay)
        changed = _under(named, compiled.policy, new)
        self._switch(changed, value, new)
        return Exchanged(container, changed, old, new)

    def complete(self, done: Exchanged) -> None:
        """Remove the old rules."""
        rulesets.retire(self._maps, [done.ruleset])
        self._release_unix(done.after.id, rulesets.endpoints_of(self._maps, done.new.ruleset))
        self._endpoints.delete_superseded(done.new.superseded)
        self._endpoints.delete_unused()

    def undo(self, done: Exchanged) -> None:
        """Put the old rules in force again, which nobody has compiled anew: they are what they were.

        First the rules, then the record: where there is no space for that (OSError), they are in force all the same.
        Raises ConflictError where somebody has replaced the new ones meanwhile.
        """
        number = ctypes.c_uint32(done.after.id)
        now = self._maps.containers.get(number)
        if now is None:
            rulesets.retire(self._maps, [done.ruleset])
        elif now.ruleset != done.new.ruleset:
            self.complete(done)
            raise ConflictError(f"{done.after.name}: its policy was replaced at the same time", "graft policy show")
        else:
            self._maps.containers.put(number, done.value)
            rulesets.retire(self._maps, [done.new.ruleset])
            self._release_unix(done.after.id, rulesets.endpoints_of(self._maps, done.ruleset))
        self._endpoints.restore_superseded(done.new.superseded)
        self._endpoints.delete_unused()
        if now is not None:
            records.save(self._settings, done.before)

    def remove_left(self) -> None:
        """Remove the rules that are nobody's: those of a command that was killed. Not between an `exchange` and what
        follows it.
        """
        left = rulesets.with_endpoints(self._maps) - {value.ruleset for _, value in self._maps.containers.items()}
        if left:
            rulesets.retire(self._maps, left)
            self._endpoints.delete_unused()

    def _switch(self, changed: Container, value: layout.ContainerValue, new: _Installed) -> None:
        """Put rules in force, and the record that tells of them in its place. That is written before: where there is no
        space for it, the old rules stay in force, and nothing is left of the new ones.
        """
        record = None
        try:
            record = records.prepare(self._settings, changed)
            self._maps.containers.put(ctypes.c_uint32(changed.id), value)
        except BaseException:
            if record is not None:
                record.discard()
            rulesets.erase(self._maps, new.ruleset)
            self._endpoints.restore_superseded(new.superseded)
            self._endpoints.delete_unused()
            unix_sockets.tidy_rules(self._settings, self._maps)
            raise
        record.commit()

    def remove(self, container: Container, reachable: bool = True) -> None:
        """Remove a container's rules and attachments. Safe to repeat, and noted before: what a command that is killed
        leaves of it, the next one removes.

        Not ``reachable``: a folder above its cgroup is held. The hooks stay attached: in transport direct the container
        is as free as where they are not, others are granted nothing. So do hooks that are another container's by now.
        """
        begun.take_back(self._settings, container.id)
        path = container.cgroup_path
        if reachable and not nesting.is_anothers(self._maps, path, container.id):
            for file in records.put_aside_at(self._settings, path):  # else `undo_begun` would take it for an attach
                file.unlink(missing_ok=True)
            attachments.detach(self._settings, path, container.cgroup_id)
        self._forget_detached(container.id, container.transport)

    def undo_begun(self, container: Container) -> None:
        """Remove what a command that was killed has begun for a container, or left of it when it removed it. Its cgroup
        is to be within reach.

        Not where it has replaced hooks of a data plane that is gone: the container is confined by both, and would be by
        none. The next `create` there completes it.
        """
        path = container.cgroup_path
        if not begun.exists(self._settings, container.id):
            return  # another command has finished or undone it
        if not records.put_aside_at(self._settings, path) or not attachments.has_programs(path):
            # Another command may have attached it since, and have been killed before it forgot this one.
            self.remove(container)
            begun.tell_undone(self._settings)

    def reap(self, gone: Collection[int]) -> None:
        """Remove the rules and records of these containers, whose cgroups are gone (`members.gone`)."""
        for container in self.listing():
            if container.id in gone:
                self._forget(container.id)

    def asked_rulesets(self) -> set[int]:
        """The rulesets of containers that have asked for their policies themselves."""
        return self._rulesets_of(one.id for one in self.listing() if not one.is_operators)

    def own_rulesets(self) -> set[int]:
        """Those of them that nobody else has written: they may lead to endpoints that are open, and to no others."""
        return self._rulesets_of(one.id for one in self.listing() if one.origin == records.PAIRS)

    def _rulesets_of(self, numbers: Iterable[int]) -> set[int]:
        found = (self._maps.containers.get(ctypes.c_uint32(number)) for number in numbers)
        return {value.ruleset for value in found if value is not None}

    def _install(self, compiled: CompiledPolicy, replaced: Collection[int] = (), container: int = 0) -> _Installed:
        """Write a policy's rules, all or none. ``replaced`` are the rulesets that they are to replace; ``container``,
        the one that has one of them: the operator replaces its policy.

        What a container has asked for itself keeps the operator from nothing: it loses an endpoint that is declared
        anew.
        """
        policy = compiled.policy
        if container or policy.origin is Origin.OPERATOR:
            replaced = {*replaced, *self.asked_rulesets()}
        superseded = self._endpoints.declare(policy.endpoints, replaced)
        try:
            stored = {found.endpoint.name: found for found in self._endpoints.listing()}
            known = {name: found.endpoint for name, found in stored.items()}
            rules = compile_for(policy, known, compiled).rules
            refuse_closed(policy, known)
            asked = self._asked_room(policy, rules, container)
            number = self._new_id()
            unix_sockets.save_rules(self._settings, policy.unix_ingress)
            with self._endpoints.namespaces(list(stored.values())) as namespaces:
                host_addresses.renew(self._maps, self._settings.host_netns, namespaces)
            rulesets.write(self._maps, number, rules, {name: found.id for name, found in stored.items()})
        except BaseException:
            self._endpoints.restore_superseded(superseded)
            self._endpoints.delete_unused()
            raise
        flags = layout.container_flags(rules.denies, rules.leaves_others, rules.names_icmp, rules.names_groups)
        relayed = needs_unix_relay(policy, known)
        return _Installed(number, rules.bind_default, rules.connect_default, flags, superseded, relayed, asked)

    def _asked_room(self, policy: Policy, rules: RuleSet, container: int) -> int:
        """How much of the maps a container asks for itself; 0 where the operator chose its policy. ``container``: the
        operator replaces its policy, whatever room there is.

        Raises RefusedError where all such containers would have more of them than they may.
        """
        if policy.origin is Origin.OPERATOR:
            return 0
        if not container and sum(one.asked for one in self.listing()) + rules.weight > MAX_ASKED_ENTRIES:
            raise RefusedError(
                "policy: containers have asked for as many rules by their environment as they may together",
                "end some of them, or name the policy in an annotation",
            )
        return rules.weight

    def _release_unix(self, container: int, kept: Collection[int] = ()) -> None:
        """Remove a container's unix sockets from the host, except for those of the endpoints ``kept``."""
        bound_sockets.release(self._settings, lambda one, endpoint: one == container and endpoint not in kept)
        unix_sockets.tidy_rules(self._settings, self._maps)

    def _forget_detached(self, number: int, transport: Transport) -> None:
        """Remove the rules and the record of a container whose programs may go on."""
        if not transport.is_supervised:
            detached.note(self._settings, number)
        self._forget(number)

    def _forget(self, number: int) -> None:
        key = ctypes.c_uint32(number)
        value = self._maps.containers.get(key)
        self._maps.containers.delete(key)
        ferries.end(self._settings, self._maps, number)
        if value is not None:
            rulesets.erase(self._maps, value.ruleset)
        if value is None or value.transport == Transport.SPLICE:
            exchanges.erase(self._maps, number)
        for counter in self._maps.counters.keys():  # noqa: SIM118
            if counter.container == number:
                self._maps.counters.delete(counter)
        self._release_unix(number)
        self._endpoints.delete_unused()
        call_times.forget(self._settings, number)
        begun.forget(self._settings, number)
        records.forget(self._settings, number)
