"""One installation of Graft on one host: its settings, its maps, and what is in them.

    with Installation.open(settings) as graft, graft.transaction() as change:
        change.endpoints.add(endpoint)

What needs the lock is a method of `Transaction`, which exists only while the lock is held. Reading needs no lock: each
change of a map is one step for a reader. What was read is of the data plane that was there then, with numbers that
stand for something else in the next one: so nobody changes that by it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Collection, Iterator

from graft.datapath import dataplane
from graft.datapath.maps import Maps, NotUpError
from graft.errors import ConflictError, PrivilegeError
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.policy.model import Policy
from graft.state import begun, bound_sockets, members, records, restored
from graft.state.compiled_policy import CompiledPolicy, compile_for
from graft.state.container_changes import ContainerChanges
from graft.state.containers import Containers
from graft.state.endpoints import EndpointChanges, Endpoints
from graft.state.records import Container


class Installation:
    """Reads an installation; `transaction` changes it. Opens each map when it is first used."""

    def __init__(self, settings: Settings) -> None:
        """Does not bring Graft up: a map that does not exist is a NotUpError when it is used."""
        self.settings = settings
        self.maps = Maps(settings.pin_dir)
        self.endpoints = Endpoints(settings, self.maps)
        self.containers = Containers(settings)

    @classmethod
    def open(cls, settings: Settings) -> Installation:
        """The installation; brings Graft up if necessary, and restores what is saved into a new data plane.

        Raises PrivilegeError, KernelError, ConflictError.
        """
        dataplane.up(settings)
        restored.ensure_restored(settings)
        graft = cls(settings)
        _ = graft.maps.settings  # before anything is read: from here on it is known which data plane that is of
        return graft

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.maps.close()

    @contextlib.contextmanager
    def transaction(self, ended: Container | None = None) -> Iterator[Transaction]:
        """Hold the installation's lock until the block ends or the process exits.

        ``ended``: a container with a supervisor, which keeps the maps that it was made with: the block removes it.
        Raises NotUpError where its number is another one's by now, ConflictError where other maps are not those of the
        data plane in force; what is done next is done on that.
        """
        try:
            with dataplane.locked(self.settings):
                if ended is None:
                    self.refuse_replaced()
                else:
                    self._refuse_anothers_number(ended)
                yield Transaction(self.settings, self.maps)
        finally:
            bound_sockets.remove_released(self.settings)

    def refuse_replaced(self) -> None:
        """Raises ConflictError where the maps that were opened are not those of the data plane in force, NotUpError
        where none is.
        """
        if not self.maps.are_pinned():
            self.maps.close()
            raise ConflictError("Graft was taken down, and brought up again, at the same time", "try again")

    def _refuse_anothers_number(self, ended: Container) -> None:
        """A new data plane may begin again with the numbers of one that `graft down` has removed."""
        there = [*self.containers.listing(), *begun.listing(self.settings)]
        if any(one.id == ended.id and one.cgroup_id != ended.cgroup_id for one in there):
            raise NotUpError(f"{ended.name}: Graft was taken down, and brought up again, while it ran")

    def compile(self, policy: Policy) -> CompiledPolicy:
        """Compile ``policy`` with the existing endpoints, before the lock is taken, so that nothing waits for it.

        Raises PolicyError, UsageError.
        """
        return compile_for(policy, policy.resolve(self.endpoints.by_name()))

    def ruleset_of(self, container: Container) -> int:
        """The number of a container's rules, which each policy has anew; 0 where it is not attached any more."""
        value = self.maps.containers.get(ctypes.c_uint32(container.id))
        return 0 if value is None else int(value.ruleset)

    def reap(self) -> None:
        """Remove the rules and records of containers whose cgroup is gone, and what killed commands have left of others
        that they were attaching or removing, or giving another policy. Quick if there are none.
        """
        self.finish_records()
        self.forget(members.gone(self.containers.listing()))
        for one in begun.listing(self.settings):
            with members.pinned(one.cgroup_path) as reachable:
                if reachable:  # else a later command does it
                    with self.transaction() as change:
                        change.containers.undo_begun(one)

    def finish_records(self) -> None:
        """Have records tell of the rules that are in force, where a command was killed between the two."""
        if records.are_any_prepared(self.settings):
            with self.transaction():
                records.finish_prepared(self.settings, lambda one: self.ruleset_of(one) == one.ruleset)

    def forget(self, gone: Collection[int]) -> None:
        """Remove the rules and records of these containers, whose cgroups are gone. Safe to repeat."""
        if gone:
            with self.transaction() as change:
                change.containers.reap(gone)


class Transaction:
    """Changes an installation, under its lock."""

    def __init__(self, settings: Settings, maps: Maps) -> None:
        self._maps = maps
        self.endpoints = EndpointChanges(settings, maps, self._new_id)
        self.containers = ContainerChanges(settings, maps, self.endpoints, self._new_id)

    def _new_id(self) -> int:
        """A new id for an endpoint, a container or a ruleset, never used before."""
        first = ctypes.c_uint32(0)
        value = self._maps.settings.get(first)
        assert value is not None
        value.last_id += 1
        self._maps.settings.put(first, value)
        return int(value.last_id)


def known_endpoints(settings: Settings | None = None) -> dict[str, Endpoint]:
    """The endpoints that a policy may name; none if Graft is not up, or without root."""
    settings = settings or Settings.from_environment()
    try:
        return Installation(settings).endpoints.by_name() if dataplane.is_up(settings) else {}
    except (PrivilegeError, PermissionError):
        return {}
