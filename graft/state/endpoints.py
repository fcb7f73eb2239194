"""Endpoints in the pinned maps: reads them; in a transaction adds, changes and deletes them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from graft.datapath import layout, rulesets
from graft.datapath.maps import Maps, needs_room
from graft.errors import ConflictError, NotFoundError
from graft.model.endpoint import Endpoint, Protocol
from graft.model.ports import ports_text
from graft.model.settings import Settings
from graft.state import bound_sockets, kept_namespaces, unix_sockets


@dataclass(frozen=True, slots=True)
class StoredEndpoint:
    """An endpoint in the maps. ``cookie`` is that of its namespace; ``declared``: a policy made it."""

    id: int
    endpoint: Endpoint
    cookie: int
    declared: bool


@dataclass(frozen=True, slots=True)
class Replaced:
    """What `EndpointChanges.replace` did to the endpoint ``before``. ``is_superseded``: its name is a new one's now.
    ``gone``: an id that no endpoint has, to which rules lead that have lost this one; 0 where none have.
    """

    before: StoredEndpoint
    is_superseded: bool
    gone: int

    @property
    def superseded(self) -> dict[str, int]:
        """As `EndpointChanges.declare` returns it."""
        return {self.before.endpoint.name: self.before.id} if self.is_superseded else {}


class Endpoints:
    """Reads endpoints. Needs no lock."""

    def __init__(self, settings: Settings, maps: Maps) -> None:
        self._settings, self._maps = settings, maps

    def listing(self) -> list[StoredEndpoint]:
        """Every endpoint, sorted by name. Raises NotUpError if Graft is not up."""
        names = [(key.name.decode(), int(number.value)) for key, number in self._maps.endpoint_names.items()]
        found = [self._read(name, number) for name, number in names]
        return sorted((stored for stored in found if stored), key=lambda stored: stored.endpoint.name)

    def by_name(self) -> dict[str, Endpoint]:
        """Every endpoint, by its name."""
        return {stored.endpoint.name: stored.endpoint for stored in self.listing()}

    def by_id(self) -> dict[int, Endpoint]:
        """Every endpoint, by its id in the maps."""
        return {stored.id: stored.endpoint for stored in self.listing()}

    def find(self, name: str) -> StoredEndpoint:
        """One endpoint. Raises NotFoundError."""
        number = self._id_of(name)
        stored = None if number is None else self._read(name, number)
        if stored is None:
            raise NotFoundError(f"name: there is no endpoint {name!r}", "graft ep show")
        return stored

    def netns_path(self, stored: StoredEndpoint) -> Path:
        """A path by which the namespace of an endpoint can be entered."""
        if stored.endpoint.netns is None:
            return self._settings.host_netns
        return kept_namespaces.pin_of(self._settings, stored.id)

    @contextlib.contextmanager
    def namespaces(self, stored: Sequence[StoredEndpoint]) -> Iterator[list[Path]]:
        """The namespaces of the host and of these endpoints. Inside the block they can be entered when an endpoint is
        deleted too.
        """
        with contextlib.ExitStack() as opened:
            paths = [self._settings.host_netns]
            for one in stored:
                with contextlib.suppress(OSError):
                    if one.endpoint.netns is not None:
                        fd = os.open(self.netns_path(one), os.O_RDONLY | os.O_CLOEXEC)
                        opened.callback(os.close, fd)
                        paths.append(Path(f"/proc/{os.getpid()}/fd/{fd}"))
            yield paths

    def _id_of(self, name: str) -> int | None:
        try:
            found = self._maps.endpoint_names.get(_key(name))
        except ValueError:  # too long, or no text: no endpoint has that name
            return None
        return None if found is None else int(found.value)

    def _read(self, name: str, number: int) -> StoredEndpoint | None:
        value = self._maps.endpoints.get(ctypes.c_uint32(number))
        if value is None:
            return None
        packed = bytes(value.addr)
        endpoint = Endpoint(
            name=name,
            address=ip_address(packed[:4] if value.family == 4 else packed),
            port=value.port,
            protocols=Protocol(value.protocols),
            netns=kept_namespaces.name_of(self._settings, number),
            open=bool(value.flags & layout.ENDPOINT_OPEN),
            dual_stack=bool(value.flags & layout.ENDPOINT_DUAL_STACK),
            last_port=value.last_port,
            unix=unix_sockets.load(self._settings, number) if value.flags & layout.ENDPOINT_UNIX else None,
            multicast=rulesets.groups_of(self._maps, number),
        )
        return StoredEndpoint(number, endpoint, int(value.netns), bool(value.flags & layout.ENDPOINT_DECLARED))


class EndpointChanges(Endpoints):
    """Changes endpoints, under the installation's lock (graft/state/installation.py)."""

    def __init__(self, settings: Settings, maps: Maps, new_id: Callable[[], int]) -> None:
        super().__init__(settings, maps)
        self._new_id = new_id

    def add(self, endpoint: Endpoint, declared: bool = False) -> int:
        """Add an endpoint and return its id. Raises ConflictError if the name is taken, NotFoundError if the namespace
        does not exist.
        """
        if self._id_of(endpoint.name) is not None:
            raise ConflictError(f"name: endpoint {endpoint.name!r} already exists", "graft ep set changes it")
        return self._add(endpoint, declared)

    def _add(self, endpoint: Endpoint, declared: bool) -> int:
        """Make a new endpoint, which has the name from here on; gives its id. Where that fails, it has not."""
        number = self._new_id()
        try:
            self._write(number, endpoint, declared)
            self._set_id(endpoint.name, number)
        except BaseException:
            self._erase(number)
            raise
        return number

    def replace(self, endpoint: Endpoint, asked: Collection[int], own: Collection[int]) -> Replaced:
        """As `change`, but what is used by the rulesets ``asked`` alone keeps the operator from nothing: these lose the
        endpoint, where it cannot be changed under them, or a policy has declared it. Its name goes to a new one then.

        Where it is not open from now on, those of the rulesets ``own`` lose it that nobody but their containers has
        written (GRAFT_CONV_PAIRS). To be followed by `complete` or `undo`. Raises what `change` raises, and KernelError
        where the maps have no room.
        """
        old = self.find(endpoint.name)
        using = rulesets.using(self._maps, old.id)
        gone = 0
        if not endpoint.open and (taken_from := using.intersection(own)):
            gone = self._new_id()
            self._lead(taken_from, old.id, gone)
        try:
            is_superseded = self._change_or_supersede(old, endpoint, is_free=using <= set(asked))
        except BaseException:
            self._give_back(gone, old.id)
            raise
        return Replaced(old, is_superseded, gone)

    def _change_or_supersede(self, old: StoredEndpoint, endpoint: Endpoint, is_free: bool) -> bool:
        """Whether its name is a new one's now."""
        try:
            if not (old.declared and is_free):
                self.change(endpoint)
                return False
        except ConflictError:
            if not is_free:
                raise
        self._add(endpoint, declared=False)
        return True

    def complete(self, done: Replaced) -> None:
        """Delete what nobody has any more after `replace`."""
        self.delete_superseded(done.superseded)
        if done.gone:
            using = rulesets.using(self._maps, done.gone)
            lost = {key.value for key, value in self._maps.containers.items() if value.ruleset in using}
            bound_sockets.release(self._settings, lambda one, endpoint: one in lost and endpoint == done.before.id)

    def undo(self, done: Replaced) -> None:
        """Make it as it was before `replace`."""
        if done.is_superseded:
            self.restore_superseded(done.superseded)
        else:
            self.change(done.before.endpoint)
        self._give_back(done.gone, done.before.id)

    def _give_back(self, gone: int, number: int) -> None:
        if gone:
            self._lead(rulesets.using(self._maps, gone), gone, number)

    def _lead(self, using: Collection[int], endpoint: int, other: int) -> None:
        """Have the rulesets ``using`` lead to ``other`` where they lead to ``endpoint``, in one step for each."""
        numbers = {number: self._new_id() for number in using}
        rulesets.copy(self._maps, numbers, endpoint, other)
        for key, value in self._maps.containers.items():
            if value.ruleset in numbers:
                value.ruleset = numbers[value.ruleset]
                self._maps.containers.put(key, value)
        rulesets.retire(self._maps, numbers)

    def change(self, endpoint: Endpoint) -> None:
        """Give an endpoint another address, protocol or namespace, from the next bind or connect on.

        Raises NotFoundError, and ConflictError if rules in force need the old address family, number of ports, or
        dynamic port.
        """
        old = self.find(endpoint.name)
        is_other_kind = (old.endpoint.unix is None) != (endpoint.unix is None)
        if is_other_kind and rulesets.using(self._maps, old.id):
            raise ConflictError(
                f"address: rules in force use {endpoint.name!r} at {old.endpoint.spec}",
                "add another endpoint for the other kind of address",
            )
        if old.endpoint.family != endpoint.family and rulesets.using(self._maps, old.id):
            raise ConflictError(
                f"address: rules in force use {endpoint.name!r} as an IPv{old.endpoint.family} endpoint",
                "add another endpoint for the other family",
            )
        self._refuse_other_ports(old, endpoint)
        if old.endpoint.multicast != endpoint.multicast and rulesets.using(self._maps, old.id):
            raise ConflictError(f"multicast: rules in force use {endpoint.name!r}", "add another endpoint")
        self._write(old.id, endpoint, old.declared)

    def _refuse_other_ports(self, old: StoredEndpoint, endpoint: Endpoint) -> None:
        """Raises ConflictError where a bind that a rule in force grants would find no port of the changed endpoint."""
        is_bound_to, serves_port_0 = rulesets.ingress_using(self._maps, old.id)
        before, after = old.endpoint.port_count, endpoint.port_count
        if is_bound_to and before != after:
            raise ConflictError(
                f"address: rules in force are for {ports_text(before)} of {endpoint.name!r}, not {after}",
                "as many ports, or add another endpoint",
            )
        if serves_port_0 and endpoint.port:
            raise ConflictError(
                f"address: rules in force redirect binds of port 0 to {endpoint.name!r}",
                "a dynamic port, or add another endpoint",
            )

    def delete(self, name: str, force: bool = False) -> None:
        """Delete an endpoint. Raises NotFoundError, and ConflictError if a container uses it, unless ``force``: then
        what was granted through it is refused from the next call on.
        """
        number = self.find(name).id
        if not force and rulesets.using(self._maps, number):
            raise ConflictError(f"name: a container uses the endpoint {name!r}", "--force deletes it")
        self._remove(name, number)

    def declare(self, endpoints: Iterable[Endpoint], replaced: Collection[int] = ()) -> dict[str, int]:
        """Make the endpoints that a policy declares; one that already exists with the same value stays.

        One that exists with another value, and that only the rulesets ``replaced`` use, is superseded: its name goes to
        a new endpoint. Returns the names and old ids of these, for `delete_superseded` or `restore_superseded`. Raises
        ConflictError for any other difference, and changes nothing then.
        """
        made: list[tuple[str, int]] = []
        superseded: dict[str, int] = {}
        try:
            for endpoint in endpoints:
                number = self._id_of(endpoint.name)
                if number is None:
                    made.append((endpoint.name, self.add(endpoint, declared=True)))
                    continue
                stored = self._read(endpoint.name, number)
                if stored and stored.endpoint != endpoint:
                    superseded[endpoint.name] = self._supersede(stored, endpoint, replaced)
        except BaseException:
            self.restore_superseded(superseded)
            for name, number in made:
                self._remove(name, number)
            raise
        return superseded

    def _supersede(self, stored: StoredEndpoint, endpoint: Endpoint, replaced: Collection[int]) -> int:
        """Give the name of ``stored`` to a new endpoint. Returns the old one's id. Raises ConflictError."""
        if not stored.declared or not rulesets.using(self._maps, stored.id) <= set(replaced):
            raise ConflictError(
                f"endpoints.{endpoint.name}: already exists, at {stored.endpoint.spec}",
                "declare the same address, or choose another name",
            )
        self._add(endpoint, declared=True)
        return stored.id

    def delete_superseded(self, superseded: dict[str, int]) -> None:
        """Delete the old endpoints of `declare`, after the rules that used them are gone."""
        for number in superseded.values():
            self._erase(number)

    def restore_superseded(self, superseded: dict[str, int]) -> None:
        """Undo `declare`: give the names back to the old endpoints, unless others have deleted them."""
        for name, number in superseded.items():
            new = self.find(name).id
            if self._read(name, number) is None:
                self._remove(name, new)
                continue
            self._set_id(name, number)
            self._erase(new)

    def delete_unused(self) -> None:
        """Delete the endpoints that a policy declared and that no rule names any more."""
        used = rulesets.endpoints_in_use(self._maps)
        listed = self.listing()
        for number in {key.value for key in self._maps.endpoints.keys()} - {one.id for one in listed} - used:  # noqa: SIM118
            self._erase(number)  # it lost its name, and those that used it have ended
        for stored in listed:
            if stored.declared and stored.id not in used:
                self._remove(stored.endpoint.name, stored.id)

    def _set_id(self, name: str, number: int) -> None:
        with needs_room("endpoint"):
            self._maps.endpoint_names.put(_key(name), ctypes.c_uint32(number))

    def _remove(self, name: str, number: int) -> None:
        self._maps.endpoint_names.delete(_key(name))
        self._erase(number)

    def _erase(self, number: int) -> None:
        self._maps.endpoints.delete(ctypes.c_uint32(number))
        bound_sockets.release(self._settings, lambda _container, endpoint: endpoint == number)
        unix_sockets.save(self._settings, number, None)
        rulesets.erase_groups(self._maps, number)
        kept_namespaces.release(self._settings, number)

    def _write(self, number: int, endpoint: Endpoint, declared: bool) -> None:
        """What may find no room is done first, and undone where something fails: the endpoint is as it was then."""
        with (
            kept_namespaces.prepared(self._settings, self._maps, number, endpoint.netns) as namespace,
            rulesets.changed_groups(self._maps, number, endpoint.multicast),
        ):
            if endpoint.unix is not None:
                unix_sockets.save(self._settings, number, endpoint.unix)
            with self._changed(number, _value(endpoint, namespace.cookie, declared)):
                namespace.commit()
        if endpoint.unix is None:
            unix_sockets.save(self._settings, number, None)

    @contextlib.contextmanager
    def _changed(self, number: int, value: layout.EndpointValue) -> Iterator[None]:
        """Put the value of an endpoint into the map; where the block fails, what was there."""
        before = self._maps.endpoints.get(ctypes.c_uint32(number))
        with needs_room("endpoint"):
            self._maps.endpoints.put(ctypes.c_uint32(number), value)
        try:
            yield
        except BaseException:
            if before is not None:
                self._maps.endpoints.put(ctypes.c_uint32(number), before)
            raise


def _value(endpoint: Endpoint, cookie: int, declared: bool) -> layout.EndpointValue:
    flags = layout.ENDPOINT_OPEN * endpoint.open | layout.ENDPOINT_DECLARED * declared
    flags |= layout.ENDPOINT_DUAL_STACK * endpoint.dual_stack | layout.ENDPOINT_UNIX * (endpoint.unix is not None)
    value = layout.EndpointValue(
        netns=cookie,
        port=endpoint.port,
        family=endpoint.family,
        protocols=endpoint.protocols,
        last_port=endpoint.last_port,
        flags=flags,
    )
    value.addr[:] = endpoint.packed16
    return value


def _key(name: str) -> layout.EndpointNameKey:
    return layout.EndpointNameKey(name.encode())
