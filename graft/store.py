"""Endpoints in the pinned maps: added, changed, listed, deleted."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from graft import layout, rules
from graft.endpoint import Endpoint, Protocol
from graft.errors import ConflictError, NotFoundError, PrivilegeError
from graft.kernel import netns
from graft.lifecycle import is_up, locked, new_id, up
from graft.maps import Maps
from graft.settings import Settings


@dataclass(frozen=True, slots=True)
class Stored:
    """An endpoint as it stands in the maps. ``cookie`` names its namespace; ``declared``: a policy made it."""

    id: int
    endpoint: Endpoint
    cookie: int
    declared: bool


def _kept(settings: Settings, number: int) -> Path:
    return settings.run_dir / "netns" / str(number)


def netns_path(settings: Settings, stored: Stored) -> Path:
    """Where the namespace of an endpoint can be entered."""
    return settings.host_netns if stored.endpoint.netns is None else _kept(settings, stored.id)


def _key(name: str) -> layout.EndpointNameKey:
    return layout.EndpointNameKey(name.encode())


def _find_id(maps: Maps, name: str) -> int:
    found = maps.endpoint_names.get(_key(name))
    if found is None:
        raise NotFoundError(f"name: there is no endpoint {name!r}", "graft ep show")
    return int(found.value)


def _read(settings: Settings, maps: Maps, name: str, number: int) -> Stored | None:
    value = maps.endpoints.get(ctypes.c_uint32(number))
    if value is None:
        return None
    packed = bytes(value.addr)
    label = _kept(settings, number).with_suffix(".name")
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


def listing(settings: Settings) -> list[Stored]:
    """Every endpoint, by name. Raises NotUpError where Graft is not up."""
    maps = Maps(settings.pin_dir)
    found = [_read(settings, maps, key.name.decode(), int(number.value)) for key, number in maps.endpoint_names.items()]
    return sorted((stored for stored in found if stored), key=lambda stored: stored.endpoint.name)


def find(settings: Settings, name: str) -> Stored:
    """One endpoint. Raises NotFoundError."""
    maps = Maps(settings.pin_dir)
    stored = _read(settings, maps, name, _find_id(maps, name))
    if stored is None:
        raise NotFoundError(f"name: there is no endpoint {name!r}", "graft ep show")
    return stored


def known_endpoints(settings: Settings | None = None) -> dict[str, Endpoint]:
    """The endpoints that a policy may name; none where Graft is not up, or may not be asked."""
    settings = settings or Settings.from_environment()
    try:
        if not is_up(settings):
            return {}
        return {stored.endpoint.name: stored.endpoint for stored in listing(settings)}
    except (PrivilegeError, PermissionError):
        return {}


def _write(settings: Settings, maps: Maps, number: int, endpoint: Endpoint, declared: bool) -> None:
    source = settings.host_netns if endpoint.netns is None else netns.resolve(endpoint.netns)
    kept = _kept(settings, number)
    cookie = netns.cookie(source)
    netns.release(kept)
    kept.with_suffix(".name").unlink(missing_ok=True)
    if endpoint.netns is not None:
        netns.keep(source, kept)
        kept.with_suffix(".name").write_bytes(os.fsencode(endpoint.netns))
    flags = layout.ENDPOINT_OPEN * endpoint.open | layout.ENDPOINT_DECLARED * declared
    flags |= layout.ENDPOINT_DUAL_STACK * endpoint.dual_stack
    value = layout.EndpointValue(
        netns=cookie, port=endpoint.port, family=endpoint.family, protocols=endpoint.protocols, flags=flags
    )
    value.addr[:] = endpoint.packed16
    maps.endpoints.put(ctypes.c_uint32(number), value)


def add(settings: Settings, endpoint: Endpoint, declared: bool = False) -> int:
    """Add an endpoint and give its id.

    Raises ConflictError for a name that is taken, NotFoundError for a namespace that is not there.
    """
    maps = up(settings)
    with locked(settings):
        return add_locked(settings, maps, endpoint, declared)


def add_locked(settings: Settings, maps: Maps, endpoint: Endpoint, declared: bool) -> int:
    """`add`, for who holds the lock already."""
    if maps.endpoint_names.get(_key(endpoint.name)) is not None:
        raise ConflictError(f"name: there is an endpoint {endpoint.name!r} already", "graft ep set changes it")
    number = new_id(maps)
    _write(settings, maps, number, endpoint, declared)
    maps.endpoint_names.put(_key(endpoint.name), ctypes.c_uint32(number))
    return number


def change(settings: Settings, endpoint: Endpoint) -> None:
    """Give the endpoint of that name another address, protocol or namespace: the next bind or connect follows.

    Raises NotFoundError, and ConflictError where rules in use need the family that it had.
    """
    maps = up(settings)
    with locked(settings):
        number = _find_id(maps, endpoint.name)
        old = _read(settings, maps, endpoint.name, number)
        if old and old.endpoint.family != endpoint.family and rules.rulesets_using(maps, number):
            raise ConflictError(
                f"address: {endpoint.name!r} is IPv{old.endpoint.family} in rules that are in use",
                "another endpoint for the other family",
            )
        _write(settings, maps, number, endpoint, bool(old and old.declared))


def delete(settings: Settings, name: str, force: bool = False) -> None:
    """Delete an endpoint. Raises NotFoundError, and ConflictError where a container uses it, unless ``force``:
    then what was granted through it is refused from the next call on.
    """
    maps = up(settings)
    with locked(settings):
        number = _find_id(maps, name)
        if not force and rules.rulesets_using(maps, number):
            raise ConflictError(f"name: a container uses the endpoint {name!r}", "--force deletes it all the same")
        remove_locked(settings, maps, name, number)


def remove_locked(settings: Settings, maps: Maps, name: str, number: int) -> None:
    """Take an endpoint out of the maps, for who holds the lock."""
    maps.endpoint_names.delete(_key(name))
    _remove(settings, maps, number)


def _remove(settings: Settings, maps: Maps, number: int) -> None:
    maps.endpoints.delete(ctypes.c_uint32(number))
    netns.release(_kept(settings, number))
    _kept(settings, number).with_suffix(".name").unlink(missing_ok=True)


def declare_locked(
    settings: Settings, maps: Maps, endpoints: tuple[Endpoint, ...], replaced: int = 0
) -> dict[str, int]:
    """The endpoints that a policy declares: made where they are missing, kept where they are the same.

    One that says something else, and that only ruleset ``replaced`` uses, gives its name to a new one; the
    old ones' names and ids are returned, for `settle_locked` or `restore_locked`. Any other is a
    ConflictError, and what was made before is taken back.
    """
    made: list[tuple[str, int]] = []
    superseded: dict[str, int] = {}
    try:
        for endpoint in endpoints:
            found = maps.endpoint_names.get(_key(endpoint.name))
            if found is None:
                made.append((endpoint.name, add_locked(settings, maps, endpoint, declared=True)))
                continue
            stored = _read(settings, maps, endpoint.name, int(found.value))
            if stored and stored.endpoint != endpoint:
                if stored.declared and rules.rulesets_using(maps, stored.id) <= {replaced}:
                    number = new_id(maps)
                    _write(settings, maps, number, endpoint, declared=True)
                    superseded[endpoint.name] = stored.id
                    maps.endpoint_names.put(_key(endpoint.name), ctypes.c_uint32(number))
                    continue
                raise ConflictError(
                    f"endpoints.{endpoint.name}: there is one already, at {stored.endpoint.spec}",
                    "the same address, or another name",
                )
    except BaseException:
        restore_locked(settings, maps, superseded)
        for name, number in made:
            remove_locked(settings, maps, name, number)
        raise
    return superseded


def settle_locked(settings: Settings, maps: Maps, superseded: dict[str, int]) -> None:
    """The rules that used them are gone: so are the old ones of `declare_locked`."""
    for number in superseded.values():
        _remove(settings, maps, number)


def restore_locked(settings: Settings, maps: Maps, superseded: dict[str, int]) -> None:
    """Undo `declare_locked`: the names are the old ones' again."""
    for name, number in superseded.items():
        new = _find_id(maps, name)
        maps.endpoint_names.put(_key(name), ctypes.c_uint32(number))
        _remove(settings, maps, new)


def forget_unused_locked(settings: Settings, maps: Maps) -> None:
    """Remove the endpoints that only a policy declared, and that no rule names any more."""
    used = {value.endpoint for _, value in maps.ingress.items()}
    used |= {value.endpoint for _, value in maps.egress_ports.items()}
    for stored in listing(settings):
        if stored.declared and stored.id not in used:
            remove_locked(settings, maps, stored.endpoint.name, stored.id)
