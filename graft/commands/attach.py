"""`graft attach`: a container that runs already comes under a policy.

What there is decides which transport can serve it (transport_choice.py). Here is what is around that choice: finding
the container, and handing its policy over.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from graft.commands.transport_choice import Observed, TransportChoice, choose_transport
from graft.errors import NotFoundError, RefusedError
from graft.kernel import cgroup, netns
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.policy.validator import grants_without_tcp
from graft.splice import client as splice
from graft.state import inventory
from graft.state.engines import FoundContainer, resolve
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class Attached:
    """What `attach` found and did; ``existing`` are the sockets that were there before the policy (None: not known).

    ``without_effect`` are fields of rules that this transport does not serve.
    """

    target: FoundContainer
    observed: Observed
    choice: TransportChoice
    container: Container
    replaced: bool
    existing: tuple[ContainerSocket, ...] | None = ()
    without_effect: tuple[str, ...] = ()


def attach(
    graft: Installation, text: str, policy: Policy, wanted: Transport | None = None, relay: str | None = None
) -> Attached:
    """Put the container that ``text`` names under ``policy``, or replace the policy that it has.

    ``relay`` (splice, kernel) is how transport splice moves bytes; None leaves it as it is, or to splice.
    Raises NotFoundError, ConflictError, RefusedError, PolicyError, KernelError; nothing is changed then.
    """
    target = _known(graft, text) if _is_attached_name(graft, text) else resolve(text)
    graft.reap()
    known = graft.containers.at(target.cgroup)
    observed = observe(graft.settings, target.cgroup, known)
    choice = choose_transport(observed, wanted)
    if relay is not None:
        _check_relay(graft.settings, choice, relay)
    existing: tuple[ContainerSocket, ...] | None = ()
    if known is not None:
        container = _replace(graft, target, known, choice, policy, relay)
    elif choice.transport is Transport.SPLICE:
        container = _relay(graft, target, policy, relay or "splice")
    else:
        container, existing = _confine(graft, target, policy, choice)
    without_effect = _unserved(graft, choice, policy)
    return Attached(target, observed, choice, container, known is not None, existing, without_effect)


def observe(settings: Settings, path: Path, attached: Container | None) -> Observed:
    """What decides the transport of the cgroup at ``path``."""
    counted: Counter[int] = Counter()
    for pid in cgroup.processes(path):
        with contextlib.suppress(OSError):  # one that ended meanwhile
            counted[os.stat(f"/proc/{pid}/ns/net").st_ino] += 1
    transport = None if attached is None else attached.transport
    return Observed(os.stat(settings.host_netns).st_ino, dict(counted), transport)


def _is_attached_name(graft: Installation, text: str) -> bool:
    return any(text == one.name and one.engine == "graft" and one.exists for one in graft.containers.listing())


def _known(graft: Installation, text: str) -> FoundContainer:
    """A container that Graft started is found by the name that `graft ps` shows."""
    container = graft.containers.find(text)
    pid = next(iter(cgroup.processes(container.cgroup_path)), 0)
    return FoundContainer(container.cgroup_path, container.engine, container.name, str(container.id), pid)


def _check_relay(settings: Settings, choice: TransportChoice, relay: str) -> None:
    if choice.transport is not Transport.SPLICE:
        raise RefusedError(f"--relay: transport {choice.transport} has none: {choice.why}", "leave --relay out")
    splice.check_relay(settings, relay)


def _replace(
    graft: Installation,
    target: FoundContainer,
    known: Container,
    choice: TransportChoice,
    policy: Policy,
    relay: str | None,
) -> Container:
    """Another policy for a container that has one."""
    if known.transport is not choice.transport:
        raise RefusedError(
            f"cgroup: it is attached by {known.transport}, and {choice.transport} is what serves now",
            "graft detach it first",
        )
    name = target.name if target.engine in ("docker", "podman", "systemd") else None
    compiled = graft.compile(policy)
    with graft.transaction() as change:
        changed = change.containers.apply(known, compiled, name, relay)
    if choice.transport is Transport.SPLICE:
        splice.attach(graft.settings, changed)
    return changed


def _confine(
    graft: Installation, target: FoundContainer, policy: Policy, choice: TransportChoice
) -> tuple[Container, tuple[ContainerSocket, ...] | None]:
    """Transport direct: the hooks. Gives the container, and the sockets that it had before."""
    settings = graft.settings
    existing = inventory.host_sockets_of(settings, cgroup.processes(target.cgroup))
    compiled = graft.compile(policy)
    with graft.transaction() as change:
        container = change.containers.create(
            compiled,
            target.cgroup,
            netns.cookie(settings.host_netns),
            choice.transport,
            name=target.name,
            engine=target.engine,
            prepare=lambda number: inventory.keep_reachable(settings, number, existing or ()),
        )
    return container, None if existing is None else tuple(existing)


def _relay(graft: Installation, target: FoundContainer, policy: Policy, relay: str) -> Container:
    """Transport splice: its hooks, and a daemon that serves it. Nothing is left of it where that fails."""
    splice.prepare(graft.settings)
    pid = next(iter(cgroup.processes(target.cgroup)), target.pid)
    try:
        cookie = netns.cookie(Path(f"/proc/{pid}/ns/net"))
    except FileNotFoundError:
        raise NotFoundError(f"cgroup: the processes of {target.name} have ended") from None
    compiled = graft.compile(policy)
    with graft.transaction() as change:
        container = change.containers.create(
            compiled, target.cgroup, cookie, Transport.SPLICE, name=target.name, engine=target.engine, relay=relay
        )
    try:
        splice.attach(graft.settings, container, pid)
    except BaseException:
        with graft.transaction() as change:
            change.containers.remove(container)
        raise
    return container


def _unserved(graft: Installation, choice: TransportChoice, policy: Policy) -> tuple[str, ...]:
    if choice.transport is Transport.DIRECT:
        return ()
    return grants_without_tcp(policy, policy.resolve(graft.endpoints.by_name()))
