"""Endpoints in the pinned maps: listed, and, in a transaction, added, changed, deleted, declared by a policy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from graft.datapath import layout, rulesets
from graft.datapath.maps import Maps
from graft.errors import ConflictError, NotFoundError
from graft.kernel import netns
from graft.model.endpoint import Endpoint, Protocol
from graft.model.settings import Settings


@dataclass(frozen=True, slots=True)
class Stored:
    """An endpoint as it stands in the maps. ``cookie`` names its namespace; ``declared``: a policy made it."""

    id: int
    endpoint: Endpoint
    cookie: int
    declared: bool


class Endpoints:
    """What there is. Everybody may read it, without the lock."""

    def __init__(self, settings: Settings, maps: Maps) -> None:
        self._settings, self._maps = settings, maps

    def listing(self) -> list[Stored]:
        """Every endpoint, by name. Raises NotUpError where Graft is not up."""
        names = [(key.name.decode(), int(number.value)) for key, number in self._maps.endpoint_names.items()]
        found = [self._read(name, number) for name, number in names]
        return sorted((stored for stored in found if stored), key=lambda stored: stored.endpoint.name)

    def by_name(self) -> dict[str, Endpoint]:
        """Every endpoint's value."""
        return {stored.endpoint.name: stored.endpoint for stored in self.listing()}

    def by_id(self) -> dict[int, Endpoint]:
        """The same, by the numbers that the maps know them by."""
        return {stored.id: stored.endpoint for stored in self.listing()}

    def find(self, name: str) -> Stored:
        """One endpoint. Raises NotFoundError."""
        number = self._number(name)
        stored = None if number is None else self._read(name, number)
        if stored is None:
            raise NotFoundError(f"name: there is no endpoint {name!r}", "graft ep show")
        return stored

    def netns_path(self, stored: Stored) -> Path:
        """Where the namespace of an endpoint can be entered."""
        return self._settings.host_netns if stored.endpoint.netns is None else self._kept(stored.id)

    def _number(self, name: str) -> int | None:
        found = self._maps.endpoint_names.get(_key(name))
        return None if found is None else int(found.value)

    def _kept(self, number: int) -> Path:
        return self._settings.run_dir / "netns" / str(number)

    def _label(self, number: int) -> Path:
        """The file with the operator's word for the namespace."""
        return self._kept(number).with_suffix(".name")

    def _read(self, name: str, number: int) -> Stored | None:
        value = self._maps.endpoints.get(ctypes.c_uint32(number))
        if value is None:
            return None
        packed = bytes(value.addr)
        label = self._label(number)
        endpoint = Endpoint(
            name=name,
            address=ip_address(packed[:4] if value.family == 4 else packed),
            port=value.port,
            protocols=Protocol(value.protocols),
            netns=os.fsdecode(label.read_bytes()) if label.exists() else None,
            open=bool(value.flags & layout.ENDPOINT_OPEN),
            dual_stack=bool(value.flags & layout.ENDPOINT_DUAL_STACK),
        )
        return Stored(number, endpoint, int(value.netns), bool(value.flags & layout.ENDPOINT_DECLARED))


class EndpointChanges(Endpoints):
    """The same for who holds the lock (graft/state/installation.py), and so may change it."""

    def __init__(self, settings: Settings, maps: Maps, new_id: Callable[[], int]) -> None:
        super().__init__(settings, maps)
        self._new_id = new_id

    def add(self, endpoint: Endpoint, declared: bool = False) -> int:
        """Add an endpoint and give its id. Raises ConflictError for a name that is taken, NotFoundError for a namespace
        that is not there.
        """
        if self._number(endpoint.name) is not None:
            raise ConflictError(f"name: there is an endpoint {endpoint.name!r} already", "graft ep set changes it")
        number = self._new_id()
        self._write(number, endpoint, declared)
        self._name(endpoint.name, number)
        return number

    def change(self, endpoint: Endpoint) -> None:
        """Give the endpoint of that name another address, protocol or namespace: the next bind or connect follows.

        Raises NotFoundError, and ConflictError where rules in use need the family that it had.
        """
        old = self.find(endpoint.name)
        if old.endpoint.family != endpoint.family and rulesets.using(self._maps, old.id):
            raise ConflictError(
                f"address: {endpoint.name!r} is IPv{old.endpoint.family} in rules that are in use",
                "another endpoint for the other family",
            )
        self._write(old.id, endpoint, old.declared)

    def delete(self, name: str, force: bool = False) -> None:
        """Delete an endpoint. Raises NotFoundError, and ConflictError where a container uses it, unless ``force``:
        then what was granted through it is refused from the next call on.
        """
        number = self.find(name).id
        if not force and rulesets.using(self._maps, number):
            raise ConflictError(f"name: a container uses the endpoint {name!r}", "--force deletes it all the same")
        self._remove(name, number)

    def declare(self, endpoints: Iterable[Endpoint], replaced: int = 0) -> dict[str, int]:
        """The endpoints that a policy declares: made where they are missing, kept where they are the same.

        One that says something else, and that only ruleset ``replaced`` uses, gives its name to a new one; the
        old ones' names and ids are returned, for `settle` or `restore`. Any other is a ConflictError, and what was
        made before is taken back.
        """
        made: list[tuple[str, int]] = []
        superseded: dict[str, int] = {}
        try:
            for endpoint in endpoints:
                number = self._number(endpoint.name)
                if number is None:
                    made.append((endpoint.name, self.add(endpoint, declared=True)))
                    continue
                stored = self._read(endpoint.name, number)
                if stored and stored.endpoint != endpoint:
                    superseded[endpoint.name] = self._supersede(stored, endpoint, replaced)
        except BaseException:
            self.restore(superseded)
            for name, number in made:
                self._remove(name, number)
            raise
        return superseded

    def _supersede(self, stored: Stored, endpoint: Endpoint, replaced: int) -> int:
        """Give the name of ``stored`` to a new one. Gives the old one's id. Raises ConflictError."""
        if not stored.declared or not rulesets.using(self._maps, stored.id) <= {replaced}:
            raise ConflictError(
                f"endpoints.{endpoint.name}: there is one already, at {stored.endpoint.spec}",
                "the same address, or another name",
            )
        number = self._new_id()
        self._write(number, endpoint, declared=True)
        self._name(endpoint.name, number)
        return stored.id

    def settle(self, superseded: dict[str, int]) -> None:
        """The rules that used them are gone: so are the old ones of `declare`."""
        for number in superseded.values():
            self._erase(number)

    def restore(self, superseded: dict[str, int]) -> None:
        """Undo `declare`: the names are the old ones' again."""
        for name, number in superseded.items():
            new = self.find(name).id
            self._name(name, number)
            self._erase(new)

    def forget_unused(self) -> None:
        """Remove the endpoints that only a policy declared, and that no rule names any more."""
        used = rulesets.endpoints_in_use(self._maps)
        for stored in self.listing():
            if stored.declared and stored.id not in used:
                self._remove(stored.endpoint.name, stored.id)

    def _name(self, name: str, number: int) -> None:
        self._maps.endpoint_names.put(_key(name), ctypes.c_uint32(number))

    def _remove(self, name: str, number: int) -> None:
        self._maps.endpoint_names.delete(_key(name))
        self._erase(number)

    def _erase(self, number: int) -> None:
        self._maps.endpoints.delete(ctypes.c_uint32(number))
        netns.release(self._kept(number))
        self._label(number).unlink(missing_ok=True)

    def _write(self, number: int, endpoint: Endpoint, declared: bool) -> None:
        source = self._settings.host_netns if endpoint.netns is None else netns.resolve(endpoint.netns)
        kept = self._kept(number)
        cookie = netns.cookie(source)
        netns.release(kept)
        self._label(number).unlink(missing_ok=True)
        if endpoint.netns is not None:
            netns.keep(source, kept)
            self._label(number).write_bytes(os.fsencode(endpoint.netns))
        flags = layout.ENDPOINT_OPEN * endpoint.open | layout.ENDPOINT_DECLARED * declared
        flags |= layout.ENDPOINT_DUAL_STACK * endpoint.dual_stack
        value = layout.EndpointValue(
            netns=cookie, port=endpoint.port, family=endpoint.family, protocols=endpoint.protocols, flags=flags
        )
        value.addr[:] = endpoint.packed16
        self._maps.endpoints.put(ctypes.c_uint32(number), value)


def _key(name: str) -> layout.EndpointNameKey:
    return layout.EndpointNameKey(name.encode())
