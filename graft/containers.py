"""Containers: a cgroup, a namespace, a policy in the maps, and a record of what an operator calls it.

The maps hold what the hooks need; the record (a file of run_dir, root's only) holds the rest. A policy is
replaced in one step: its rules are written under a new number, then one entry names that number.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from graft import attachments, json_text, layout, rules, store
from graft.address import shown
from graft.compile import RuleSet, compile_policy
from graft.endpoint import Endpoint
from graft.errors import ConflictError, NotFoundError, RefusedError, UsageError
from graft.kernel import cgroup
from graft.kernel.pidfd import MAX_PID
from graft.layout import Transport
from graft.lifecycle import locked, new_id
from graft.limits import check_size
from graft.maps import Maps
from graft.policy import Policy
from graft.settings import Settings

_REQUIRED = {"id", "name", "cgroup", "transport", "netns", "policy", "endpoints"}
_MAX_RECORD = 1 << 20
_MAX_ID, _MAX_COOKIE = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Container:
    """What is known of an attached container. ``pid`` is the process that holds it (0: none is needed).

    ``cgroup_id`` tells its cgroup from a later one of the same path; ``engine`` is whose container it is; ``relay``
    (splice, kernel) is how transport splice moves its bytes.
    """

    id: int
    name: str
    cgroup: str
    transport: str
    netns: int
    policy: str
    endpoints: tuple[str, ...]
    pid: int = 0
    cgroup_id: int = 0
    engine: str = "graft"
    relay: str = "splice"

    @property
    def cgroup_path(self) -> Path:
        """Its folder in the v2 tree."""
        return Path(self.cgroup)

    @property
    def is_there(self) -> bool:
        """Whether its cgroup still is: the same one, not another that was made at that path."""
        with contextlib.suppress(OSError):
            return self.cgroup_id in (0, cgroup.cgroup_id(self.cgroup_path))
        return False


def records_folder(settings: Settings) -> Path:
    """Where the records lie, a file for each container."""
    return settings.run_dir / "containers"


def _save(settings: Settings, container: Container) -> None:
    folder = records_folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = folder / f".{container.id}"
    aside.touch(mode=0o600)
    aside.write_text(json.dumps(asdict(container)))
    aside.rename(folder / f"{container.id}.json")


def parse_record(raw: bytes, name: str) -> Container:
    """The container in a record of file name ``name``. Raises UsageError that says what is wrong with it."""
    found = json_text.mapping(json_text.parse(raw, name, _MAX_RECORD), name)
    if missing := _REQUIRED - found.keys():
        raise UsageError(f"{name}: no {' and no '.join(sorted(missing))}")
    try:
        number = json_text.number(found["id"], "id", _MAX_ID)
        transport = Transport[json_text.text(found["transport"], "transport").upper()]
        container = Container(
            id=number,
            name=json_text.text(found["name"], "name"),
            cgroup=json_text.path(found["cgroup"], "cgroup"),
            transport=transport.name.lower(),
            netns=json_text.number(found["netns"], "netns", _MAX_COOKIE),
            policy=json_text.text(found["policy"], "policy"),
            endpoints=tuple(json_text.texts(found["endpoints"], "endpoints")),
            pid=json_text.number(found.get("pid"), "pid", MAX_PID),
            cgroup_id=json_text.number(found.get("cgroup_id"), "cgroup_id", _MAX_COOKIE),
            engine=json_text.text(found.get("engine"), "engine") or "graft",
            relay=json_text.text(found.get("relay"), "relay") or "splice",
        )
    except KeyError as error:
        raise UsageError(f"{name}: transport: {shown(error.args[0])} is none") from None
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}") from None
    if name != f"{number}.json" or not container.cgroup.startswith("/") or ".." in container.cgroup_path.parts:
        raise UsageError(f"{name}: id {number} at {shown(container.cgroup)} is no container")
    return container


def records(settings: Settings) -> tuple[list[Container], list[UsageError]]:
    """Every container that is attached, oldest first; and what is wrong with each record that cannot be read."""
    found, wrong = [], []
    for path in records_folder(settings).glob("*.json"):
        try:
            with path.open("rb") as file:
                found.append(parse_record(file.read(_MAX_RECORD + 1), path.name))
        except FileNotFoundError:  # it was removed just now
            continue
        except OSError as error:
            wrong.append(UsageError(f"{path}: cannot be read: {error.strerror}"))
        except UsageError as error:
            wrong.append(UsageError(f"{path.parent}/{error.message}"))
    return sorted(found, key=lambda container: container.id), wrong


def listing(settings: Settings) -> list[Container]:
    """Every container that is attached, oldest first. One whose record cannot be read is left out (see `records`)."""
    return records(settings)[0]


def find(settings: Settings, name: str) -> Container:
    """The container of that name, cgroup or id. Raises NotFoundError, which tells of records that cannot be read."""
    found, wrong = records(settings)
    for container in found:
        if name in (container.name, container.cgroup, str(container.id)):
            return container
    hint = "; ".join(["graft ps", *(error.message for error in wrong[:1])])
    raise NotFoundError(f"container: {shown(name)} is not attached", hint)


@dataclass(frozen=True, slots=True)
class _Installed:
    """A policy's rules in the maps: their number, the defaults, and the endpoints that gave up their names to it."""

    ruleset: int
    bind_default: int
    connect_default: int
    flags: int
    superseded: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A policy's entries, and the endpoints by which they were made."""

    endpoints: dict[str, Endpoint]
    rules: RuleSet


def _compile(settings: Settings, policy: Policy) -> _Compiled:
    """Compile ``policy`` before anybody has to wait for it. Raises PolicyError, UsageError."""
    check_size(policy)
    stored = {found.endpoint.name: found.endpoint for found in store.listing(settings)}
    return _compile_for(policy, policy.resolve(stored))


def _compile_for(policy: Policy, endpoints: Mapping[str, Endpoint], before: _Compiled | None = None) -> _Compiled:
    """With these endpoints; what was compiled ``before``, where those that the policy names are still the same."""
    named = {name: endpoints[name] for name in _endpoint_names(policy) if name in endpoints}
    if before is not None and before.endpoints == named:
        return before
    return _Compiled(named, compile_policy(policy, endpoints))


def _install_locked(settings: Settings, maps: Maps, policy: Policy, before: _Compiled, replaced: int = 0) -> _Installed:
    """Write a policy's rules, in the place of ruleset ``replaced`` if there is one. All of them, or nothing."""
    superseded = store.declare_locked(settings, maps, policy.endpoints, replaced)
    try:
        stored = {found.endpoint.name: found for found in store.listing(settings)}
        compiled = _compile_for(policy, {name: found.endpoint for name, found in stored.items()}, before).rules
        number = new_id(maps)
        rules.write(maps, number, compiled, {name: found.id for name, found in stored.items()})
    except BaseException:
        store.restore_locked(settings, maps, superseded)
        store.forget_unused_locked(settings, maps)
        raise
    return _Installed(number, compiled.bind_default, compiled.connect_default, compiled.flags, superseded)


def _endpoint_names(policy: Policy) -> tuple[str, ...]:
    named = [rule.endpoint for rule in policy.ingress]
    named += [rule.endpoint for rule in policy.egress if rule.endpoint]
    return tuple(dict.fromkeys(named))


def at(settings: Settings, path: Path) -> Container | None:
    """The container of the cgroup at ``path``, None where none is attached there."""
    return next((one for one in listing(settings) if one.cgroup == str(path) and one.is_there), None)


def _refuse_nesting(settings: Settings, maps: Maps, path: Path) -> None:
    scope = maps.scopes.get(ctypes.c_uint64(cgroup.cgroup_id(path)))
    if scope is not None and scope.container and maps.containers.get(ctypes.c_uint32(scope.container)) is None:
        attachments.detach(settings, path)  # what a command that was killed left on it
    other = attachments.nested(path)
    if other == path:
        raise ConflictError(f"cgroup: {path} is attached already", "graft ps")
    if other is not None:
        where = "below" if path.is_relative_to(other) else "above"
        raise RefusedError(
            f"cgroup: {path} lies {where} {other}, which is attached: each call would be decided twice",
            "graft detach the other one first",
        )


def create(
    settings: Settings,
    maps: Maps,
    policy: Policy,
    path: Path,
    netns: int,
    transport: Transport,
    pid: int = 0,
    *,
    name: str | None = None,
    engine: str = "graft",
    relay: str = "splice",
    prepare: Callable[[int], None] | None = None,
) -> Container:
    """Put the cgroup at ``path`` under ``policy``. ``netns``: cookie of the namespace its processes live in.

    ``name`` is by default the policy's. ``prepare`` is called with the container's id when its rules are there and
    no hook yet is. Nothing stays behind where it fails (PolicyError, ConflictError,
    KernelError; RefusedError where a cgroup above or below is attached).
    """
    compiled = _compile(settings, policy)
    with locked(settings):
        reap_locked(settings, maps)
        _refuse_nesting(settings, maps, path)
        new = _install_locked(settings, maps, policy, compiled)
        number = new_id(maps)
        try:
            value = layout.ContainerValue(
                netns, new.ruleset, transport, new.bind_default, new.connect_default, new.flags
            )
            maps.containers.put(ctypes.c_uint32(number), value)
            if prepare is not None:
                prepare(number)
            attachments.attach(settings, path, number, splice=transport is Transport.SPLICE)
            container = Container(
                id=number,
                name=name or policy.name,
                cgroup=str(path),
                transport=transport.name.lower(),
                netns=netns,
                policy=policy.name,
                endpoints=_endpoint_names(policy),
                pid=pid,
                cgroup_id=cgroup.cgroup_id(path),
                engine=engine,
                relay=relay,
            )
            _save(settings, container)
        except BaseException:
            attachments.detach(settings, path)
            _forget_locked(settings, maps, number)
            raise
    return container


def apply(
    settings: Settings,
    maps: Maps,
    container: Container,
    policy: Policy,
    name: str | None = None,
    relay: str | None = None,
) -> Container:
    """Replace a container's policy in one step: no call is decided by neither, or by half of both.

    ``name``, ``relay``: what they are from now on, if that changes.
    """
    compiled = _compile(settings, policy)
    with locked(settings):
        key = ctypes.c_uint32(container.id)
        value = maps.containers.get(key)
        if value is None:
            raise NotFoundError(f"container: {container.name!r} is not attached", "graft ps")
        old = value.ruleset
        new = _install_locked(settings, maps, policy, compiled, replaced=old)
        value.ruleset, value.flags = new.ruleset, new.flags
        value.bind_default, value.connect_default = new.bind_default, new.connect_default
        maps.containers.put(key, value)
        rules.erase(maps, old)
        store.settle_locked(settings, maps, new.superseded)
        store.forget_unused_locked(settings, maps)
        named = name or container.name
        changed = replace(
            container,
            name=named,
            policy=policy.name,
            endpoints=_endpoint_names(policy),
            relay=relay or container.relay,
        )
        _save(settings, changed)
    return changed


def remove(settings: Settings, maps: Maps, container: Container) -> None:
    """Take a container's rules and attachments away. Safe to repeat."""
    with locked(settings):
        if container.is_there:
            attachments.detach(settings, container.cgroup_path)
        _forget_locked(settings, maps, container.id)


def _forget_locked(settings: Settings, maps: Maps, number: int) -> None:
    key = ctypes.c_uint32(number)
    value = maps.containers.get(key)
    maps.containers.delete(key)
    if value is not None:
        rules.erase(maps, value.ruleset)
    for counter in maps.counters.keys():  # noqa: SIM118
        if counter.container == number:
            maps.counters.delete(counter)
    store.forget_unused_locked(settings, maps)
    (records_folder(settings) / f"{number}.json").unlink(missing_ok=True)


def reap(settings: Settings, maps: Maps) -> None:
    """`reap_locked`, for who does not hold the lock; quick where there is nothing to do."""
    if all(container.is_there for container in listing(settings)):
        return
    with locked(settings):
        reap_locked(settings, maps)


def reap_locked(settings: Settings, maps: Maps) -> None:
    """Forget the containers whose cgroup is gone: it took its sockets with it, and its rules go too."""
    for container in listing(settings):
        if not container.is_there:
            _forget_locked(settings, maps, container.id)


def is_populated(container: Container) -> bool:
    """Whether any process lives in it."""
    return cgroup.populated(container.cgroup_path)
